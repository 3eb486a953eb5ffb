"""What the monitor says at a terminal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fitting import fit, trainer
from small_data import training_data
from small_models import Small
from torch.utils.data import DataLoader

from lightning_bn import ActivationStats, ActivationStatsMonitor, BatchNormRecalibration, Episode


class Dies(Small):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 5:
            with torch.no_grad():
                self.bn1.bias.fill_(-100.0)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("rich", [True, False])
def test_three_lines_at_the_end(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What, where first, since when; what follows; what to do. `str` and a notebook show the same."""
    if not rich:
        monkeypatch.setattr("lightning_bn.callbacks.terminal.find_spec", lambda name: None)
    monitor = ActivationStatsMonitor(every_n_steps=1)
    fit(monitor, module=Dies(lr=0.0), max_epochs=7)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line]
    start = next(place for place, line in enumerate(lines) if line.startswith("Sick: "))
    assert lines[start].startswith("Sick: rest.0: share of activations that are zero 1 (limit 0.95) since step 5.")
    assert lines[start + 1] == "  No other layer follows."
    assert lines[start + 2].startswith("  To do: Lower the learning rate")
    assert str(monitor) in out
    assert monitor._repr_html_().startswith("<pre>Sick: rest.0")


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    """verbose=False prints nothing, of a fit or of a validation; a fit speaks once, and so does a validation alone."""
    data = DataLoader(training_data(), 16)
    fit(ActivationStatsMonitor(verbose=False), module=Dies(), max_epochs=2)
    assert "Sick" not in capsys.readouterr().out
    monitor = ActivationStatsMonitor()
    fit(monitor, max_epochs=2)
    assert capsys.readouterr().out.count(str(monitor)) == 1
    trainer(monitor := ActivationStatsMonitor()).validate(Small(), data, verbose=False)
    assert capsys.readouterr().out.count(str(monitor)) == 1


def test_before_a_sample_it_is_the_call() -> None:
    """Printed before a run the monitor is its call, like every callback; its verdict is that nothing was seen."""
    monitor = ActivationStatsMonitor("rest.*", every_n_steps=5)
    assert str(monitor) == repr(monitor) == "ActivationStatsMonitor(layers='rest.*', every_n_steps=5)"
    assert monitor.verdict() == ["Nothing was seen: no sample was taken."]
    fit(monitor, max_epochs=1)
    assert str(monitor) == "\n".join(monitor.verdict()) != repr(monitor)


class InTest(Small):
    """Its ReLU gets nothing but what is below 0."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.bn1.bias.fill_(-100.0)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_by_itself_has_a_verdict(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`validate` and `test` print what was sick in them, with the name of the stage, once."""
    monitor = ActivationStatsMonitor()
    runner = trainer(monitor)
    getattr(runner, stage)(InTest(), DataLoader(training_data(), 16), verbose=False)
    out = capsys.readouterr().out
    assert out.count("Sick: ") == out.count(str(monitor)) == 1
    name = {"validate": "validation", "test": "test"}[stage]
    assert f"Sick: rest.0: share of activations that are zero 1 (limit 0.95) at step 0 in {name}." in out


def test_each_episode_is_handed_out_as_it_begins() -> None:
    """`on_episode` gets each episode once, in the step in which it begins, with what to do; its errors are the user's,
    and what is no function is refused at once."""
    seen: list[tuple[int, Episode]] = []
    runner: Any = None

    def alert(episode: Episode) -> None:
        seen.append((runner.global_step, episode))

    monitor = ActivationStatsMonitor(every_n_steps=1, on_episode=alert, verbose=False)
    runner = trainer(monitor, max_epochs=7, limit_val_batches=0)
    runner.fit(Dies(lr=0.0), DataLoader(training_data(), 16), DataLoader(training_data(), 16))
    assert [(each.layer, each.statistic, each.first) for _, each in seen] == [
        (each.layer, each.statistic, each.first) for each in monitor.episodes()
    ]
    assert [step for step, _ in seen] == [each.first + 1 for _, each in seen]
    assert seen[0][1].advice

    def fails(episode: Episode) -> None:
        raise ConnectionError(str(episode))

    with pytest.raises(ConnectionError, match=r"rest\.0"):
        fit(ActivationStatsMonitor(every_n_steps=1, on_episode=fails, verbose=False), module=Dies(lr=0.0), max_epochs=7)
    with pytest.raises(TypeError, match=r"ActivationStatsMonitor\(on_episode=3\)"):
        ActivationStatsMonitor(on_episode=3)  # type: ignore[arg-type]


def test_plots() -> None:
    """`plot` of the monitor, of a report and of a metric gives the figure and the axes, as torchmetrics does; the
    monitor's shows the table, and refuses what is not in it."""
    repair = BatchNormRecalibration()
    monitor = ActivationStatsMonitor(every_n_steps=1, verbose=False)
    fit(monitor, repair, max_epochs=1)
    figure, axes = monitor.plot("zero_fraction")
    assert figure is axes.figure
    drawn = np.asarray(axes.images[0].get_array(), dtype=float)
    values = [row["zero_fraction"] for row in monitor.table() if row["layer"] == "rest.0" and row["stage"] == "train"]
    assert drawn[0].tolist() == pytest.approx(values)
    with pytest.raises(ValueError, match=r"plot\('grad_std', 'train'\): there is no such row"):
        monitor.plot("grad_std")
    assert repair.report is not None
    figure, axes = repair.report.plot()
    assert [bar.get_width() for bar in axes.patches[: len(repair.report.layers)]] == [
        layer.mean_shift_rms for layer in repair.report.layers
    ]
    stats = ActivationStats(2)
    stats.update(torch.tensor([[1.0, 4.0], [3.0, 6.0]]))
    figure, axes = stats.plot()
    assert axes.lines[0].get_ydata().tolist() == [2.0, 5.0]
    assert repair.report.plot(axes) == (figure, axes) == stats.plot(stats.compute(), axes)
