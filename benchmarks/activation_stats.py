"""What it costs to look at a network: a training step of a ResNet-20 with this package's collector and with what peers
do.

All variants have the same weights and batches and are timed in turn, round after round, in this one run; printed are
medians of the rounds' ratios to the plain step. Each peer is measured at a step at which it looks, so are all of this
package's.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import delve
import torch
import torch.nn.functional as F
from batch_norm import ratios
from resnet import resnet20
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.sample_to_table import LayerTable, scalars
from lightning_bn.activations.watched_layers import select_layers

Look = Callable[[nn.Module], AbstractContextManager[Any]]


def ours(model: nn.Module, **options: Any) -> Look:
    """The collector as the monitor uses it: hooks placed and removed, one transfer, a row a layer, the scalars over all
    layers."""
    collector, table = LayerCollector(model, select_layers(model), **options), LayerTable()

    @contextmanager
    def look(_: nn.Module) -> Any:
        collector.attach()
        yield
        collector.detach()
        sample = collector.collect()
        table.append("train", 0, 0, sample)
        scalars(sample)

    return look


def hooked(see: Callable[[str, Tensor], Any]) -> Look:
    """A peer that hooks the same layers as this package and does `see` with each output."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
            see(name, output.detach())

        return hook

    @contextmanager
    def look(model: nn.Module) -> Any:
        handles = [
            layer.register_forward_hook(hook_of(name))
            for name, layer in model.named_modules()
            if isinstance(layer, (_BatchNorm, nn.ReLU))
        ]
        yield
        for handle in handles:
            handle.remove()

    return look


def fastai(name: str, output: Tensor) -> Any:
    """What fastai's ActivationStats(with_hist=True) takes, fastai/callback/hook.py."""
    near_zero = (output <= 0.05).long().sum().item() / output.numel()
    return output.mean().item(), output.std().item(), near_zero, output.cpu().histc(40, 0, 10)


def fastai_without_histogram(name: str, output: Tensor) -> Any:
    """What fastai's ActivationStats() takes."""
    return output.mean().item(), output.std().item(), (output <= 0.05).long().sum().item() / output.numel()


def with_delve(model: nn.Module, directory: Path) -> Look:
    """delve's saturation: a covariance for each convolution and linear layer (it has none of batch norms or ReLUs)."""
    delve.SaturationTracker(str(directory / "delve"), "csv", model, stats=["lsat"], device="cpu")
    return lambda _: nullcontext()


def step_of(model: nn.Module, look: Look, batch_size: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (batch_size,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        with look(model):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module="delve")
    plain = resnet20()
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        looks: dict[str, Callable[[nn.Module], Look]] = {
            "plain step": lambda model: lambda _: nullcontext(),
            "plain step again (noise)": lambda model: lambda _: nullcontext(),
            "lightning-bn: drift only": lambda model: ours(model, activations=False),
            "lightning-bn: everything": ours,
            "lightning-bn: everything and gradients": lambda model: ours(model, gradients=True),
            "fastai: mean, std, near zero": lambda model: hooked(fastai_without_histogram),
            "fastai: and a histogram": lambda model: hooked(fastai),
            "delve: saturation of convolutions": lambda model: with_delve(model, Path(folder)),
            "bolts: add_histogram": lambda model: hooked(lambda name, output: writer.add_histogram(name, output)),
        }
        steps = {}
        for name, look in looks.items():
            model = copy.deepcopy(plain)
            steps[name] = step_of(model, look(model), options.batch_size)
        with tqdm(total=len(steps) * (options.rounds + 1), unit="step") as bar:
            found = ratios(steps, options.rounds, 1, bar)
    print(
        f"\ntime of a step relative to a plain one, median of {options.rounds} interleaved rounds, "
        f"{torch.get_num_threads()} threads\n"
    )
    print("| a step with | every step | every 50th step |\n|---|---:|---:|")
    for name, ratio in found.items():
        # Between the steps at which it looks this package has no hook and runs no code but a comparison of two
        # integers.
        print(
            f"| {name} | {ratio:.3f} | "
            + (f"{1 + (ratio - 1) / 50:.3f} |" if name.startswith("lightning-bn") else " |")
        )


if __name__ == "__main__":
    main()
