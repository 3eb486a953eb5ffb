"""An oracle of what ActivationStatsMonitor measures, and ways to read its table, for the tests of the callback."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_bn import ActivationStatsMonitor

LAYERS = ["bn1", "rest.0", "rest.3", "rest.4"]  # of Small, in forward order
ROWS = ["input", *LAYERS]


class Recorder(pl.Callback):
    """An oracle beside the monitor: every layer's inputs, outputs, output gradients and buffers before them, batch by
    batch."""

    def __init__(self) -> None:
        self.batches: dict[str, list[dict[str, dict[str, Any]]]] = {"train": [], "val": []}
        self.handles: list[Any] = []

    def watch(self, stage: str, module: pl.LightningModule) -> None:
        self.unwatch()
        batch: dict[str, dict[str, Any]] = {}
        self.batches[stage].append(batch)

        def see(name: str) -> Any:
            def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
                entry = batch[name] = {"input": args[0].detach().clone(), "output": output.detach().clone()}
                if output.requires_grad:
                    output.register_hook(lambda gradient: entry.update(gradient=gradient.clone()))

            return hook

        def before(name: str) -> Any:
            def hook(layer: nn.Module, args: Any) -> None:
                batch[f"{name}/buffers"] = {key: value.clone() for key, value in layer.state_dict().items()}

            return hook

        for name, layer in module.named_modules():
            if name in LAYERS:
                self.handles += [layer.register_forward_pre_hook(before(name)), layer.register_forward_hook(see(name))]

    def unwatch(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def on_train_batch_start(self, trainer: Any, pl_module: pl.LightningModule, *_: Any) -> None:
        self.watch("train", pl_module)

    def on_train_batch_end(self, *_: Any) -> None:
        self.unwatch()

    def on_validation_batch_start(self, trainer: Any, pl_module: pl.LightningModule, *_: Any) -> None:
        self.watch("val", pl_module)

    def on_validation_batch_end(self, *_: Any) -> None:
        self.unwatch()


def mean_std(numbers: list[float]) -> tuple[float, float]:
    mean = math.fsum(numbers) / len(numbers)
    return mean, math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))


def flat(tensors: list[Tensor]) -> list[float]:
    return [value for tensor in tensors for value in tensor.double().flatten().tolist()]


def drift_of(inputs: list[Tensor], buffers: dict[str, Tensor], eps: float = 1e-5) -> tuple[float, float]:
    shifts, ratios = [], []
    for channel in range(inputs[0].shape[1]):
        mean, std = mean_std(flat([batch[:, channel] for batch in inputs]))
        scale = buffers["running_var"][channel].item() + eps
        shifts.append((mean - buffers["running_mean"][channel].item()) / math.sqrt(scale))
        ratios.append(math.log((std**2 + eps) / scale))
    shift, ratio = (math.sqrt(sum(value**2 for value in values) / len(values)) for values in (shifts, ratios))
    return shift, ratio


def rows(monitor: ActivationStatsMonitor, stage: str, step: int | None = None) -> dict[str, dict[str, Any]]:
    found = [row for row in monitor.table() if row["stage"] == stage]
    step = found[0]["step"] if step is None else step
    return {row["layer"]: row for row in found if row["step"] == step}
