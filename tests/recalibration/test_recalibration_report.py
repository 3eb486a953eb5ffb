"""The report of a pass, the way back, and the bar."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
import torch
from recalibration_models import cnn, estimate, everything, largest_errors, mlp, statistics, three
from states import as_bytes
from torch import nn

import lightning_bn
from lightning_bn import Window, convert_batch_norm, recalibrate, recalibrated


def test_a_dry_run_reports_and_changes_nothing() -> None:
    """What it says is what a real run then does."""
    model, data = mlp(3), torch.randn(40, 10)
    before = everything(model)
    dry = estimate(model, data.split(9), dry_run=True)
    dry.rollback()
    assert before == everything(model)
    real = estimate(model, data.split(9))
    assert dry.layers == real.layers
    assert str(dry).startswith("Would recalibrate 3")
    assert str(real).startswith("Recalibrated 3")


def test_the_report_has_the_figures_of_every_layer() -> None:
    """Against a naive computation from the statistics before and after."""
    model, data = mlp(3), torch.randn(40, 10) * 4 + 1
    model(data)
    before = statistics(model)
    report = estimate(model, data.split(9))
    for layer in report.layers:
        (old_mean, old_var), (new_mean, new_var) = before[layer.name], statistics(model)[layer.name]
        shift = [
            abs(float(n - o)) / math.sqrt(float(v) + 1e-5) for o, n, v in zip(old_mean, new_mean, old_var, strict=True)
        ]
        ratio = [abs(math.log((float(n) + 1e-5) / (float(o) + 1e-5))) for o, n in zip(old_var, new_var, strict=True)]
        assert layer.mean_shift_max == pytest.approx(max(shift), rel=1e-5)
        assert layer.mean_shift_rms == pytest.approx(math.sqrt(sum(s * s for s in shift) / len(shift)), rel=1e-5)
        assert layer.log_variance_ratio_max == pytest.approx(max(ratio), rel=1e-5)
        assert layer.log_variance_ratio_rms == pytest.approx(
            math.sqrt(sum(r * r for r in ratio) / len(ratio)), rel=1e-5
        )
        assert (layer.samples, layer.batches, layer.kind) == (40, 5, "BatchNorm1d")


def test_the_report_prints_as_an_aligned_table_with_the_worst_layer_first() -> None:
    """One row a layer, all of one width, sorted by how far the statistics moved."""
    model = nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(12)])
    model[7].running_mean.fill_(50.0)
    text = str(estimate(model, torch.randn(4, 8, 2).unbind()))
    _, header, *rows = text.splitlines()
    assert {len(header)} == {len(row) for row in rows}
    assert len(rows) == 12
    assert header.split()[:3] == ["layer", "kind", "samples"]
    assert rows[0].split()[:4] == ["7", "BatchNorm1d", "32", "4"]


def test_as_dict_is_ready_for_json() -> None:
    """Plain values under the names that the docs give."""
    report = estimate(three(), torch.randn(4, 8, 2).unbind())
    found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert (found["batches"], found["samples"], found["skipped"], found["not_run"]) == (4, 32, 0, [])
    assert [layer["name"] for layer in found["layers"]] == ["0", "1", "2"]


def test_rollback_is_exact() -> None:
    """To the bit, in place, -0.0 and denormals included."""
    model = three()
    model[0].running_mean.copy_(torch.tensor([-0.0, 1e-42]))
    data = [torch.randn(8, 2)]
    before = everything(model)
    report = estimate(model, data)
    assert before != everything(model)
    report.rollback()
    assert before == everything(model)


@pytest.mark.parametrize(
    "averaging",
    [
        Window(3),
        Window(3, pooled=True),
        lightning_bn.Exponential(0.1, pooled=True),
        lightning_bn.Cumulative(pooled=True),
    ],
)
def test_training_goes_on_after_a_rollback_as_if_nothing_had_been(averaging: lightning_bn.Averaging) -> None:
    """The history of an average is private and never touched: bit for bit, over more batches than a window holds."""
    model, data = convert_batch_norm(three(), averaging), torch.randn(12, 8, 2)
    for batch in data[:4]:
        model(batch)
    twin = copy.deepcopy(model)
    estimate(model, data.unbind()).rollback()
    for batch in data[4:]:
        model(batch)
        twin(batch)
        assert {k: as_bytes(v) for k, v in model.state_dict().items()} == {
            k: as_bytes(v) for k, v in twin.state_dict().items()
        }


def test_the_new_statistics_serve_until_the_next_training_batch() -> None:
    """Then a window is again the last batches', and an exponential average blends the batch into them."""
    data = torch.randn(6, 8, 2) + 3
    window, exponential = convert_batch_norm(three(), Window(3)), three()
    for batch in data[:4]:
        window(batch)
        exponential(batch)
    twin = copy.deepcopy(window)
    for model in (window, exponential):
        estimate(model, data.unbind())
        assert not torch.equal(model[0].running_mean, twin[0].running_mean)
    new = exponential[0].running_mean.clone()
    for model in (window, twin, exponential):
        model(data[4])
    assert torch.equal(window[0].running_mean, twin[0].running_mean)
    torch.testing.assert_close(exponential[0].running_mean, 0.9 * new + 0.1 * data[4].mean(0))


def test_recalibrated_lends_the_statistics_to_the_block() -> None:
    """Inside the new ones, outside the old ones to the bit, also on an exception; the report is what `as` gives."""
    model, data = cnn(1), torch.rand(20, 1, 5, 5) + 2
    before = everything(model)
    with recalibrated(model, data.split(6), progress=False, prior=3) as report:
        inside = statistics(model)
        assert report.batches == 4
    assert before == everything(model)
    with pytest.raises(KeyError), recalibrated(model, data.split(6), progress=False):
        raise KeyError
    assert before == everything(model)
    estimate(model, data.split(6), prior=3)
    assert largest_errors(statistics(model), inside) == (0, 0)


# --- the bar
# ----------------------------------------------------------------------------------------------------------------------


def test_the_bar_tells_the_layers_and_the_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 80 columns too. `progress=False` is silent."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    data = torch.randn(12, 4, 2)
    estimate(three(), data.unbind(), tolerance=0.01)
    assert capsys.readouterr() == ("", "")
    recalibrate(three(), data.unbind(), tolerance=0.01)
    shown = capsys.readouterr().err
    assert "Recalibrating 3 layers: |" in shown
    assert "12/12" in shown
    assert re.search(r"12/12, std error 0\.\d+, goal 0\.01 \[", shown)
    recalibrate(three(), data.unbind(), exact=True, num_batches=5)
    shown = capsys.readouterr().err
    assert "5/5" in shown
    assert "layer 3 of 3" in shown
