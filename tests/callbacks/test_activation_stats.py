"""ActivationStatsMonitor in real fits: what it measures, and what it must survive."""

from __future__ import annotations

import gc
import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from fits import Small, fit, parameters_equal, trainer, training_data
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import ActivationStatsMonitor, BatchNorm1d, Exponential, Window
from lightning_bn.activations.collector import to_host
from lightning_bn.activations.registry import COLUMNS

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
    return tuple(math.sqrt(sum(value**2 for value in values) / len(values)) for values in (shifts, ratios))  # type: ignore[return-value]


def rows(monitor: ActivationStatsMonitor, stage: str, step: int | None = None) -> dict[str, dict[str, Any]]:
    found = [row for row in monitor.table() if row["stage"] == stage]
    step = found[0]["step"] if step is None else step
    return {row["layer"]: row for row in found if row["step"] == step}


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d, lambda width: BatchNorm1d(width, averaging=Window(3))], ids=["torch's", "window"]
)
def test_training_is_measured_at_every_nth_step(layer: Any) -> None:
    """Each row of the table is what loops over the recorded activations, gradients and buffers of that step give."""
    module = Small()
    module.bn1, module.rest[3] = layer(5), layer(3)
    recorder = Recorder()
    monitor = ActivationStatsMonitor(every_n_steps=3, gradients=True)
    fit(recorder, monitor, module=module, max_epochs=2)
    steps = sorted({row["step"] for row in monitor.table() if row["stage"] == "train"})
    assert steps == [0, 3, 6, 9]
    assert [row["layer"] for row in monitor.table()[:5]] == ROWS
    for step in steps:
        batch, found = recorder.batches["train"][step], rows(monitor, "train", step)
        for name in LAYERS:
            outputs = flat([batch[name]["output"]])
            mean, std = mean_std(outputs)
            row = found[name]
            assert (row["mean"], row["std"]) == (pytest.approx(mean, abs=1e-6), pytest.approx(std, rel=1e-6))
            assert row["abs_max"] == pytest.approx(max(map(abs, outputs)))
            assert row["nonfinite"] == 0
            assert row["grad_std"] == pytest.approx(mean_std(flat([batch[name]["gradient"]]))[1], rel=1e-5)
        for name in ("rest.0", "rest.4"):
            assert found[name]["zero_fraction"] == pytest.approx(
                flat([batch[name]["output"]]).count(0) / batch[name]["output"].numel()
            )
            assert found[name]["drift_mean"] is None
        for name in ("bn1", "rest.3"):
            drift_mean, drift_var = drift_of([batch[name]["input"]], batch[f"{name}/buffers"])
            assert found[name]["drift_mean"] == pytest.approx(drift_mean, rel=1e-3)
            assert found[name]["drift_var"] == pytest.approx(drift_var, rel=1e-3)
            assert found[name]["zero_fraction"] is None
    last = rows(monitor, "train", 9)["bn1"]
    weight = module.bn1.weight.detach()
    after = recorder.batches["train"][10]["bn1/buffers"]  # the next step's: parameters as they were after step 9
    assert (last["weight_min"], last["weight_max"]) == (after["weight"].min().item(), after["weight"].max().item())
    assert not torch.equal(after["weight"], weight)


def test_validation_is_measured_over_the_whole_epoch() -> None:
    """Validation rows pool all batches of the epoch; drift is that of the inputs to the running statistics in use."""
    recorder, monitor = Recorder(), ActivationStatsMonitor()
    fit(recorder, monitor, max_epochs=1, num_sanity_val_steps=2)
    batches = recorder.batches["val"][-3:]
    found = rows(monitor, "val")
    assert {row["step"] for row in monitor.table() if row["stage"] == "val"} == {
        5
    }  # where Lightning files val_loss too
    for name in LAYERS:
        mean, std = mean_std(flat([batch[name]["output"] for batch in batches]))
        assert (found[name]["mean"], found[name]["std"]) == (
            pytest.approx(mean, abs=1e-6),
            pytest.approx(std, rel=1e-6),
        )
    for name in ("bn1", "rest.3"):
        expected = drift_of([batch[name]["input"] for batch in batches], batches[0][f"{name}/buffers"])
        assert (found[name]["drift_mean"], found[name]["drift_var"]) == pytest.approx(expected, rel=1e-5)


class Dying(Small):
    """Gives a ReLU 64 channels of a batch of 256, of which some die for good at step 5, and one fires now and then."""

    def __init__(self, dying: int) -> None:
        super().__init__()
        self.dying = dying
        self.norm, self.relu = nn.BatchNorm1d(64), nn.ReLU()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        data = torch.randn(256, 64)
        data[:, 63] -= 2.5  # fires in one of 160
        data[:, : self.dying] -= 100.0 * (self.global_step >= 5)
        self.relu(self.norm(data) * 0 + data)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("dying", [1, 64])
def test_channels_are_dead_from_when_they_died(dying: int) -> None:
    """One of 64 is counted by itself, at the very sample after which it fires no more; one that fires now and then is
    alive."""
    monitor = ActivationStatsMonitor("relu", every_n_steps=1)
    fit(monitor, module=Dying(dying), val=None, max_epochs=2)
    found = [row for row in monitor.table() if row["layer"] == "relu"]
    assert [row["died_channels"] for row in found] == [0.0] * 5 + [float(dying)] * 7
    assert [row["dead_fraction"] for row in found] == [0.0] * 5 + [dying / 64] * 7
    (episode,) = [each for each in monitor.episodes() if each.statistic == "died_channels"]
    assert (episode.layer, episode.first, episode.recovered) == ("relu", 5, False)


def test_dead_channels_of_a_validation_are_its_own() -> None:
    """A channel that is dead in one validation counts as dead there, however alive it was in the validation before."""

    class Dies(Small):
        def on_validation_epoch_start(self) -> None:
            if self.current_epoch == 1:
                with torch.no_grad():
                    self.bn1.weight.zero_()
                    self.bn1.bias.fill_(-1.0)

    monitor = ActivationStatsMonitor(layers="rest.0")
    fit(monitor, module=Dies(lr=0.0), num_sanity_val_steps=0)
    found = [row["dead_fraction"] for row in monitor.table() if (row["stage"], row["layer"]) == ("val", "rest.0")]
    assert found == [0.0, 1.0]


def test_training_is_the_same_to_the_bit() -> None:
    """Weights, buffers and the random numbers drawn are the same with and without the monitor, all options on."""
    plain, _ = fit(val=None)
    state = torch.get_rng_state()
    watched, _ = fit(ActivationStatsMonitor(every_n_steps=1, gradients=True, histograms=True), val=None)
    assert parameters_equal(plain, watched)
    assert all(torch.equal(one, other) for one, other in zip(plain.buffers(), watched.buffers(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def hooks(module: nn.Module) -> int:
    return sum(
        len(each._forward_hooks) + len(each._forward_pre_hooks) + len(each._backward_hooks) for each in module.modules()
    )


def test_hooks_are_there_only_while_they_are_wanted() -> None:
    """Between the sampled steps, and after the fit, no module has a hook."""
    seen = {}

    class Counts(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen[self.trainer.global_step] = hooks(self)
            return super().training_step(batch, batch_idx)

    module, _ = fit(ActivationStatsMonitor(every_n_steps=4), module=Counts(), max_epochs=1)
    assert [step for step, number in seen.items() if number] == [0, 4]
    assert hooks(module) == 0


def test_forwards_between_two_sampled_steps_are_not_seen() -> None:
    """Where every step is sampled, what the module runs between two of them, and an evaluation in the middle of the
    epoch, are not in the samples of training."""

    class Between(Small):
        def on_train_batch_end(self, *args: Any) -> None:
            with torch.no_grad():
                self.eval()(1e3 * torch.ones(2, 4))
                self.train()

    far = DataLoader(TensorDataset(1e3 * torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)), 4)
    near = DataLoader(TensorDataset(torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)), 4)
    tables = []
    for make, val in ((Small, near), (Between, far)):
        torch.manual_seed(0)
        monitor = ActivationStatsMonitor(every_n_steps=1)
        fit(monitor, module=make(), val=val, max_epochs=1, val_check_interval=2)
        tables.append([row for row in monitor.table() if row["stage"] == "train"])
    assert len(tables[0]) > 6 * 4
    assert str(tables[1]) == str(tables[0])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["training", "validation"])
def test_an_exception_leaves_no_hook_behind(error: type[BaseException], stage: str) -> None:
    """Whatever is raised in the middle of a watched step, the model is without hooks, and the table has what came
    before."""

    class Fails(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if stage == "training" and batch_idx == 3:
                raise error("stop")
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if stage == "validation":
                raise error("stop")

    module, monitor = Fails(), ActivationStatsMonitor(every_n_steps=1)
    with pytest.raises((error, SystemExit)):
        fit(monitor, module=module, num_sanity_val_steps=0)
    assert hooks(module) == 0
    assert {row["step"] for row in monitor.table()} == set(range(3 if stage == "training" else 6))
    fit(monitor, max_epochs=1)  # and it can be used again
    assert len({row["step"] for row in monitor.table() if row["stage"] == "train"}) == 6


def test_accumulated_batches_are_one_sample() -> None:
    """With accumulate_grad_batches=3, one row pools the three batches of its optimizer step, and validation between
    them does not enter."""
    recorder, monitor = Recorder(), ActivationStatsMonitor(every_n_steps=1)
    fit(recorder, monitor, accumulate_grad_batches=3, max_epochs=1, val_check_interval=2)
    assert sorted({row["step"] for row in monitor.table() if row["stage"] == "train"}) == [0, 1]
    for step in (0, 1):
        batches = recorder.batches["train"][3 * step : 3 * step + 3]
        mean, std = mean_std(flat([batch["rest.0"]["output"] for batch in batches]))
        row = rows(monitor, "train", step)["rest.0"]
        assert (row["mean"], row["std"]) == (pytest.approx(mean), pytest.approx(std))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_is_no_second_sample(reentrant: bool) -> None:
    """Under activation checkpointing rows are what they are without it, gradients included; NaNs are counted once."""

    class Checkpointed(Small):
        def __init__(self, on: bool) -> None:
            super().__init__()
            self.on = on
            self.rest[1].p = 0.0
            self.bn1, self.rest[3] = BatchNorm1d(5), BatchNorm1d(3)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.bn1(self.first(inputs))
            if self.trainer.global_step == 5:
                hidden[0, 0] = math.nan
            return checkpoint(self.rest, hidden, use_reentrant=reentrant) if self.on else self.rest(hidden)

    tables = []
    for on in (False, True):
        torch.manual_seed(0)
        monitor = ActivationStatsMonitor(every_n_steps=1, gradients=True)
        fit(monitor, module=Checkpointed(on), max_epochs=1, val=None)
        tables.append(monitor.table())
    pd.testing.assert_frame_equal(*(pd.DataFrame(table) for table in tables))
    assert rows(monitor, "train", 5)["rest.0"]["nonfinite"] == 1


class Shapes(Small):
    """A layer called twice, one called with two widths, one that returns a tuple, and one that no forward reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.wide = nn.Linear(5, 7)
        self.lstm = nn.LSTM(7, 2, batch_first=True)
        self.spare = nn.ReLU()
        self.seen: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.relu(self.bn1(self.first(inputs)))
        again = self.relu(hidden - 0.5)
        output, _ = self.lstm(self.relu(self.wide(again)))
        self.seen += [hidden.detach(), again.detach(), output.detach()]
        return output


def test_reused_layers_widths_and_tuples() -> None:
    """Each call has a row, also one with another width; of a tuple the first tensor counts; what is never called is
    named."""
    monitor = ActivationStatsMonitor(layers=[nn.ReLU, nn.LSTM, "spare"], every_n_steps=100)
    module = Shapes()
    with pytest.warns(UserWarning, match="sees nothing of rest.0, rest.4, spare in training: no forward"):
        fit(monitor, module=module, val=None, max_epochs=1)
    found = rows(monitor, "train", 0)
    assert list(found) == ["input", "relu#1", "relu#2", "relu#3", "lstm"]
    for call in (0, 1):
        assert found[f"relu#{call + 1}"]["mean"] == pytest.approx(module.seen[call].mean().item())
    assert found["lstm"]["mean"] == pytest.approx(module.seen[2].mean().item())


class Makes(nn.Module):
    """A layer that gives another kind of tensor than it is given; `back` makes of that what the next layer takes."""

    def __init__(self, make: Any, back: Any) -> None:
        super().__init__()
        self.make, self.back = make, back

    def forward(self, inputs: Tensor) -> Any:
        return self.make(inputs)


class Odd(Small):
    """Goes through `odd` behind the first batch norm, which it calls by keyword."""

    def __init__(self, odd: Makes) -> None:
        super().__init__()
        self.odd = odd

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.bn1(input=self.first(inputs))
        return self.rest(self.odd.back(self.odd(hidden), hidden))


class Unreadable(Tensor):
    """A third-party tensor, which has its own idea of what can be done with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("aminmax", "nan_to_num"):
            raise NotImplementedError(f"no {func.__name__} here\nnor anywhere")
        return super().__torch_function__(func, types, args, kwargs or {})


ODD: dict[str, tuple[Any, Any, str]] = {
    "sparse": (lambda x: x.to_sparse(), lambda y, x: y.to_dense(), "sparse_coo"),
    "compressed": (lambda x: x.detach().to_sparse_csr(), lambda y, x: y.to_dense() + x, "sparse_csr"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), lambda y, x: x, "nested"),
    "jagged": (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), lambda y, x: x, "nested"),
    "float8": (lambda x: x.detach().to(torch.float8_e4m3fn), lambda y, x: y.float() + x, "float8_e4m3fn"),
    "meta": (lambda x: x.to("meta"), lambda y, x: x, "on the meta device"),
    "integer": (lambda x: x.round().int(), lambda y, x: y + x, "int32"),
    "complex": (lambda x: x.to(torch.complex64), lambda y, x: y.real, "complex64"),
    "another failure": (lambda x: x.as_subclass(Unreadable), lambda y, x: x, "NotImplementedError: no aminmax here"),
}


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors", "ignore:Lazy modules")
@pytest.mark.parametrize("kind", ODD)
def test_what_cannot_be_read_is_left_out(kind: str) -> None:
    """A layer whose output no kernel can read, in validation as in training, is named once a stage with the reason,
    and the fit goes on, gradients and histograms included; a batch norm called by keyword is seen."""
    make, back, reason = ODD[kind]
    monitor = ActivationStatsMonitor(
        layers=[Makes, nn.BatchNorm1d], every_n_steps=1, gradients=True, histograms=True, verbose=False
    )
    with pytest.warns(UserWarning, match="leaves out what it can't read") as told:
        fit(monitor, module=Odd(Makes(make, back)))
    told_of = [str(one.message).partition("can't read in ")[2] for one in told if "leaves out" in str(one.message)]
    assert told_of == [f"{stage}: odd ({reason})." for stage in ("validation", "training")]
    for stage in ("train", "val"):
        assert {row["layer"] for row in monitor.table() if row["stage"] == stage} == {"input", "bn1", "rest.3"}
    found = rows(monitor, "train", 5)["bn1"]
    assert found["std"] == pytest.approx(1, abs=0.2)
    assert found["drift_mean"] > 0


def test_a_failure_that_comes_later_is_told_too() -> None:
    """A layer that can't be read from the second epoch on is named then, though others were named before."""

    class Later(Odd):
        def __init__(self) -> None:
            super().__init__(Makes(lambda x: x.to_sparse(), lambda y, x: y.to_dense()))
            self.late = Makes(lambda x: x.to("meta") if self.current_epoch else x, None)

        def forward(self, inputs: Tensor) -> Tensor:
            self.late(inputs)
            return super().forward(inputs)

    monitor = ActivationStatsMonitor(layers=Makes, every_n_steps=1, verbose=False)
    with pytest.warns(UserWarning, match="leaves out what it can't read") as told:
        fit(monitor, module=Later(), val=None, max_epochs=3)
    assert [str(one.message).partition(" in training: ")[2] for one in told if "leaves out" in str(one.message)] == [
        "odd (sparse_coo).",
        "late (on the meta device).",
    ]


def test_a_length_is_no_width() -> None:
    """A layer whose dimension 1 is another at each step is told apart from one with channels, once, with the mend."""

    class Lengths(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.rest[0](torch.ones(2, 10 + self.trainer.global_step, 3))
            return super().training_step(batch, batch_idx)

    monitor = ActivationStatsMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match=r"rest.0 gave activations of more than 8 sizes.*channel_dim=-1") as told:
        fit(monitor, module=Lengths(), val=None, max_epochs=2)
    assert len([one for one in told if "sizes" in str(one.message)]) == 1
    monitor = ActivationStatsMonitor(layers="rest.0", every_n_steps=1, channel_dim=-1)
    fit(monitor, module=Lengths(), val=None, max_epochs=2)
    assert {row["layer"] for row in monitor.table()} == {"input", "rest.0", "rest.0[5]"}


def test_half_precision_is_summed_wide() -> None:
    """Under bf16-true, rows are what the bfloat16 activations give in float64, and drift is observed since the buffers
    are too coarse."""
    recorder, monitor = Recorder(), ActivationStatsMonitor(every_n_steps=1)
    fit(recorder, monitor, max_epochs=1, precision="bf16-true", val=None)
    batch, row = recorder.batches["train"][5], rows(monitor, "train", 5)["bn1"]
    assert batch["bn1"]["output"].dtype == torch.bfloat16
    assert row["std"] == pytest.approx(mean_std(flat([batch["bn1"]["output"]]))[1])
    assert row["drift_mean"] == pytest.approx(drift_of([batch["bn1"]["input"]], batch["bn1/buffers"])[0], rel=1e-4)


def test_averagings_that_do_not_tell_are_observed() -> None:
    """Where the buffers don't tell the batch, the hook of the sampled step looks at the layer's input."""
    module = Small()
    module.bn1 = BatchNorm1d(5, averaging=Exponential(0.1, pooled=True))
    recorder, monitor = Recorder(), ActivationStatsMonitor(every_n_steps=2)
    fit(recorder, monitor, module=module, max_epochs=1, val=None)
    batch = recorder.batches["train"][4]
    expected = drift_of([batch["bn1"]["input"]], batch["bn1/buffers"])
    row = rows(monitor, "train", 4)["bn1"]
    assert (row["drift_mean"], row["drift_var"]) == pytest.approx(expected, rel=1e-4)


def test_drift_alone_needs_no_hook() -> None:
    """activations=False logs drift and affine parameters of batch-norm layers, places no hook, and agrees with the full
    table."""
    most = []

    class Counts(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            most.append(hooks(self))
            return super().training_step(batch, batch_idx)

    light, full = ActivationStatsMonitor(every_n_steps=1, activations=False), ActivationStatsMonitor(every_n_steps=1)
    fit(light, module=Counts(), val=None)
    assert set(most) == {0}
    fit(full, val=None)
    kept = [name for name in COLUMNS if name.startswith(("drift", "weight", "bias"))]
    assert [row["layer"] for row in light.table()[:2]] == ["bn1", "rest.3"]
    assert all(row["mean"] is None for row in light.table())
    assert [[row[name] for name in kept] for row in light.table()] == [
        [row[name] for name in kept] for row in full.table() if row["layer"] in ("bn1", "rest.3")
    ]


def test_nan_and_empty_activations() -> None:
    """NaN and infinite activations are counted and left out of the moments, an empty batch is none, and histograms
    survive both."""

    class Spoiled(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.rest[0](torch.full((2, 5), math.nan) if batch_idx else torch.empty(0, 5))
            return super().training_step(batch, batch_idx)

    recorder, monitor = Recorder(), ActivationStatsMonitor(every_n_steps=1, histograms=True)
    fit(recorder, monitor, module=Spoiled(), max_epochs=1, val=None)
    first, second = (rows(monitor, "train", step)["rest.0"] for step in (0, 1))
    assert (first["nonfinite"], second["nonfinite"]) == (0, 10)
    assert second["mean"] == pytest.approx(recorder.batches["train"][1]["rest.0"]["output"].double().mean().item())

    class AllNaN(Small):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs * math.nan)

    monitor = ActivationStatsMonitor(every_n_steps=1, histograms=True)
    fit(monitor, module=AllNaN(), max_epochs=1)
    row = rows(monitor, "train", 0)["rest.0"]
    assert all(math.isnan(row[name]) for name in ("mean", "std", "abs_max", "zero_fraction", "dead_fraction"))
    assert row["nonfinite"] == 40


def test_compiled_models_are_seen() -> None:
    """Layers inside a compiled model are measured, compiled before or after, under their own names; other steps stay
    compiled."""
    compiled_runs = []

    def backend(graph: Any, example: Any) -> Any:
        def run(*args: Any) -> Any:
            compiled_runs.append(1)
            return graph(*args)

        return run

    class Compiled(Small):
        def __init__(self) -> None:
            super().__init__()
            self.rest[1].p = 0.0
            self.rest = torch.compile(self.rest, backend=backend, fullgraph=True)

    recorder, monitor = Recorder(), ActivationStatsMonitor(every_n_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own while it compiles
        torch.manual_seed(0)
        fit(monitor, module=Compiled(), max_epochs=1, val=None)
    torch.manual_seed(0)
    plain = Small()
    plain.rest[1].p = 0.0
    fit(recorder, module=plain, max_epochs=1, val=None)
    assert list(rows(monitor, "train", 4)) == ROWS
    for name in LAYERS:
        expected = mean_std(flat([recorder.batches["train"][4][name]["output"]]))
        assert (rows(monitor, "train", 4)[name]["mean"], rows(monitor, "train", 4)[name]["std"]) == pytest.approx(
            expected, rel=1e-4, abs=1e-5
        )
    assert len(compiled_runs) == 4


def test_the_table_lies_where_the_loggers_are(tmp_path: Path) -> None:
    """Beside each logger's files, without one in default_root_dir, of the last run alone; a fast_dev_run leaves
    none."""
    runs: dict[str, Any] = {
        "fast": {"fast_dev_run": True, "logger": None},
        "none": {"logger": False},
        "csv": {"logger": [CSVLogger(tmp_path / "logs", version=0), Memory()]},
    }
    for name, options in runs.items():
        for _ in range(2):
            monitor = ActivationStatsMonitor(verbose=False)
            fit(monitor, **{"max_epochs": 1, "default_root_dir": tmp_path / name} | options)
            assert list(rows(monitor, "train", 0)) == ROWS
    found = {path.relative_to(tmp_path): path for path in tmp_path.rglob("activation_stats.csv")}
    assert set(map(str, found)) == {"none/activation_stats.csv", "logs/lightning_logs/version_0/activation_stats.csv"}
    for path in found.values():
        assert len(pd.read_csv(path)) == len(monitor.table())


def test_validate_and_test_alone() -> None:
    """trainer.validate and trainer.test give rows of their stage."""
    monitor, module = ActivationStatsMonitor(), Small()
    module.test_step = module.validation_step
    data = DataLoader(training_data(), 16)
    trainer(monitor).validate(module, data, verbose=False)
    trainer(monitor).test(module, data, verbose=False)
    assert [(row["layer"], row["stage"]) for row in monitor.table()] == [
        (name, stage) for stage in ("val", "test") for name in ROWS
    ]
    assert hooks(module) == 0


def test_several_fits_and_a_resumed_one(tmp_path: Path) -> None:
    """A fit that goes on adds to the table, at the steps that come next; one that starts anew starts a new table."""
    monitor = ActivationStatsMonitor(every_n_steps=4)
    _, runner = fit(monitor, max_epochs=1, val=None)
    runner.save_checkpoint(tmp_path / "one.ckpt")
    steps = lambda: sorted({row["step"] for row in monitor.table()})  # noqa: E731
    assert steps() == [0, 4]
    fit(monitor, max_epochs=3, val=None, ckpt_path=tmp_path / "one.ckpt")
    assert steps() == [0, 4, 8, 12, 16]
    fit(monitor, max_epochs=1, val=None)
    assert steps() == [0, 4]
    fresh = ActivationStatsMonitor(every_n_steps=4)
    fit(fresh, max_epochs=3, val=None, ckpt_path=tmp_path / "one.ckpt")
    assert sorted({row["step"] for row in fresh.table()}) == [8, 12, 16]


def test_a_model_without_a_matching_layer_is_told_once() -> None:
    """One warning, with the module's class and what to write, and an empty table; training goes on."""
    monitor = ActivationStatsMonitor("layer4.*")
    with pytest.warns(UserWarning, match=r"layers='layer4.\*'\) finds nothing to look at: Small has no module") as told:
        fit(monitor, max_epochs=1)
    assert len([one for one in told if "finds nothing" in str(one.message)]) == 1
    assert monitor.table() == []


def test_mistakes_are_told_at_once() -> None:
    """A wrong argument raises before anything is trained, with the call to make."""
    with pytest.raises(ValueError, match="at least 1, as in every_n_steps=50"):
        ActivationStatsMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match='"worst", "all"'):
        ActivationStatsMonitor(scalars=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a class"):
        fit(ActivationStatsMonitor(layers=3))  # type: ignore[arg-type]


class Memory(Logger):
    """Another's logger, which knows no more than Lightning's interface."""

    name, version = "memory", 0  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""


def test_other_loggers_get_the_scalars(tmp_path: Path) -> None:
    """Through the Logger interface: worst and median of each statistic at the sampled steps, and each layer's for
    scalars="all"."""
    memory = Memory()
    monitor = ActivationStatsMonitor(every_n_steps=3, scalars="all")
    fit(monitor, logger=[memory, CSVLogger(tmp_path, version=0)], max_epochs=1, log_every_n_steps=3)
    ours = [
        (step, metrics) for step, metrics in memory.metrics if any(name.startswith("activations") for name in metrics)
    ]
    assert [step for step, _ in ours] == [0, 3, 5]
    found = rows(monitor, "train", 3)
    metrics = ours[1][1]
    stds = [found[name]["std"] for name in LAYERS]
    assert metrics["activations/std/median"] == pytest.approx(sorted(stds)[1] / 2 + sorted(stds)[2] / 2)
    assert metrics["activations/std/worst"] == max(stds, key=lambda std: abs(math.log(std)))
    assert metrics["activations/drift_mean/worst"] == max(found[name]["drift_mean"] for name in ("bn1", "rest.3"))
    assert metrics["activations/zero_fraction/rest.0"] == found["rest.0"]["zero_fraction"]
    assert ours[2][1]["activations_val/std/bn1"] == rows(monitor, "val")["bn1"]["std"]
    assert "activations/std/median" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]


def test_one_transfer_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a sampled step no value is read from the device before the one transfer that brings all layers' to the
    host."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from lightning_bn.activations import collector

    reads: list[str] = []
    transfers: list[int] = []
    real = collector.to_host

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default and not transfers:
                reads.append(str(func))
            return func(*args, **(kwargs or {}))

    def counted(tensors: Any) -> Any:
        transfers.append(len(tensors))
        return real(tensors)

    monkeypatch.setattr(collector, "to_host", counted)
    monkeypatch.setattr("lightning_bn.activations.reading._may_look", lambda data: False)  # as on an accelerator
    module = Small()
    layers = {name: layer for name, layer in module.named_modules() if name in LAYERS}
    watched = collector.LayerCollector(module, layers, gradients=True, histograms=LAYERS)
    with Reads():
        watched.attach()
        module.rest(module.bn1(module.first(torch.randn(8, 4)))).sum().backward()
        watched.detach()
        watched.collect()
    assert len(transfers) == 1
    assert reads == []


def test_memory_does_not_grow_with_the_steps() -> None:
    """Of tensors there are as many after sixty sampled steps as after twenty; what grows is the table alone."""
    alive = []

    class Counts(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step in (20, 60):
                gc.collect()
                alive.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))

    fit(Counts(), ActivationStatsMonitor(every_n_steps=1, gradients=True), max_epochs=11, val=None)
    assert alive[1] <= alive[0]


def test_sampling_is_dense_at_first() -> None:
    """Without every_n_steps the interval doubles after every 16 samples, until it is the Trainer's; 0 there is
    never."""
    monitor = ActivationStatsMonitor(verbose=False)
    fit(monitor, log_every_n_steps=4, max_epochs=12, val=None)
    steps = [*range(16), *range(16, 48, 2), *range(48, 72, 4)]
    assert sorted({row["step"] for row in monitor.table()}) == steps
    monitor = ActivationStatsMonitor()
    fit(monitor, log_every_n_steps=0, val=None)
    assert monitor.table() == []


def test_ailments_and_pictures_without_tensorboard() -> None:
    """After a run without any logger the monitor says what is sick and draws the same heat maps; what it can't draw it
    tells."""

    class Dies(Small):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                with torch.no_grad():
                    self.bn1.weight.zero_()
                    self.bn1.bias.fill_(-1.0)

    monitor = ActivationStatsMonitor(every_n_steps=2)
    fit(monitor, module=Dies(lr=0.0), val=None)
    found = {(each.layer, each.statistic): (each.first, each.value) for each in monitor.ailments()}
    assert found["rest.0", "zero_fraction"] == found["bn1", "weight_near_zero"] == (6, 1.0)
    assert monitor.picture("zero_fraction").shape[1:] == (640, 3)
    with pytest.raises(ValueError, match=r"picture\('nonsense', 'train'\).*there are std, abs_max"):
        monitor.picture("nonsense")
    with pytest.raises(ValueError, match="there are none"):
        monitor.picture("std", "val")


def test_one_transfer_keeps_every_bit() -> None:
    """Tensors of all dtypes and shapes come to the host as they are, NaN payloads and odd offsets included."""
    tensors = [
        torch.tensor(math.nan),
        torch.arange(3, dtype=torch.int8),
        torch.randn(2, 3),
        torch.randn(3, 2).T.bfloat16(),
        torch.empty(0, 4),
    ]
    tensors += [torch.tensor([True]), torch.arange(5), torch.randn(2, 1, dtype=torch.float64), torch.randn(5)]
    for one, other in zip(tensors, to_host(tensors), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert to_host([]) == []
