"""ActivationStatsMonitor and unusual activations: reused layers, tuples, what can't be read, half precision, NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fitting import fit
from monitored import Recorder, drift_of, flat, mean_std, rows
from small_models import Small
from states import hooks
from torch import Tensor, nn

from lightning_bn import ActivationStatsMonitor, BatchNorm1d, Exponential
from lightning_bn.activations.registry import COLUMNS


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


class Ghost(Small):
    """One norm for the parts that a batch is cut into, as in a ghost batch norm; its output is one tensor again."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.cat([self.bn1(part) for part in self.first(inputs).chunk(4)])
        self.seen.append(hidden.detach())
        return self.rest(hidden)


def test_parts_of_one_batch_are_one_row() -> None:
    """With the numbers of them all: they are one place, however many there are."""
    monitor = ActivationStatsMonitor(layers="bn1", every_n_steps=100)
    module = Ghost()
    fit(monitor, module=module, val=None, max_epochs=1)
    found = rows(monitor, "train", 0)
    assert list(found) == ["input", "bn1"]
    assert found["bn1"]["mean"] == pytest.approx(module.seen[0].mean().item(), abs=1e-6)
    assert found["bn1"]["std"] == pytest.approx(module.seen[0].std().item(), rel=1e-4)


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

    monitor = ActivationStatsMonitor(every_n_steps=1, channel_dim=1)
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
    norms = [row for row in full.table() if row["layer"] in ("bn1", "rest.3")]
    shown, expected = ([[row[name] for name in kept] for row in rows] for rows in (light.table(), norms))
    assert repr(shown) == repr(expected)  # NaN is not equal to itself


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
