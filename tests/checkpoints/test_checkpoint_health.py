"""What is read from checkpoint files, against loops over their numbers; and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_bn import BatchNorm1d, Window
from lightning_bn.checkpoints.health import compare_checkpoints, inspect_checkpoint
from lightning_bn.checkpoints.reading import CheckpointRefusedError


def trained() -> nn.Sequential:
    """Return a model whose two layers have seen three batches."""
    model = nn.Sequential(
        nn.Linear(3, 4), BatchNorm1d(4, averaging=Window(2)), nn.Linear(4, 2), nn.BatchNorm1d(2, affine=False)
    )
    for _ in range(3):
        model(torch.randn(8, 3))
    return model


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def levels(path: Path) -> list[tuple[str, str | None, str]]:
    return [(finding.level, finding.rule, finding.layer) for finding in inspect_checkpoint(path).findings]


def test_figures_are_those_of_the_file(tmp_path: Path) -> None:
    """Ranges are those a loop finds; a layer without weight and bias has none; a sound file has no findings."""
    model = trained()
    health = inspect_checkpoint(saved(model.state_dict(), tmp_path / "model.pt"))
    first, second = health.layers
    for name, low, high in (
        ("running_mean", first.mean_min, first.mean_max),
        ("running_var", first.var_min, first.var_max),
    ):
        values = [float(value) for value in getattr(model[1], name)]
        assert (low, high) == (min(values), max(values))
    assert (first.name, first.channels, first.batches_tracked, first.dtype) == ("1", 4, 3, "float32")
    assert (first.weight_min, first.bias_max) == (1.0, 0.0)
    assert (second.name, second.weight_min, second.bias_max) == ("3", None, None)
    assert (first.dead, first.exploded, first.nonfinite) == (0, 0, 0)
    assert health.findings == ()
    assert health.sound


def test_every_kind_of_damage_is_found_worst_first(tmp_path: Path) -> None:
    """NaN, infinity and negative variances, dead and exploded channels, untouched and 16-bit layers, uneven counts."""
    state = {}
    for name in ("a", "b", "c", "d", "e"):
        layer = nn.BatchNorm1d(4)
        layer(torch.randn(8, 4) + 3)
        state |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    state["a.running_var"] = torch.tensor([1e-9, 1.0, 1.0, 1.0])
    state["b.running_var"] = torch.tensor([1e-9, 0.0, 2e6, 1.0])
    state["c.running_mean"], state["c.running_var"] = torch.zeros(4), torch.ones(4)
    state["c.num_batches_tracked"] = torch.tensor(0)
    state["d.running_mean"] = torch.tensor([math.nan, math.inf, 0.0, 2.0])
    state["d.running_var"] = torch.tensor([-1.0, 1.0, 1.0, 1.0])
    state["e.running_var"] = state["e.running_var"].bfloat16()
    state["e.num_batches_tracked"] = torch.tensor(7)
    path = saved(state, tmp_path / "sick.pt")
    assert levels(path) == [
        ("error", "BN203", "d"),
        ("warning", None, "b"),
        ("warning", None, "b"),
        ("warning", "BN204", "c"),
        ("info", None, "a"),
        ("info", "BN206", "e"),
        ("info", None, ""),
    ]
    health = inspect_checkpoint(path)
    by_name = {layer.name: layer for layer in health.layers}
    assert (by_name["a"].dead, by_name["b"].dead, by_name["b"].exploded) == (1, 2, 1)
    assert (by_name["d"].nonfinite, by_name["d"].mean_min, by_name["d"].mean_max) == (3, 0.0, 2.0)
    assert by_name["e"].dtype == "bfloat16"
    assert not health.sound
    assert health.as_dict()["findings"][0]["layer"] == "d"


def test_layers_are_found_wherever_the_state_dict_is(tmp_path: Path) -> None:
    """A state_dict, a Lightning checkpoint and a dict of models; batch norm alone has no prefix; averaging rows are no
    layer."""
    state = trained().state_dict()
    assert "1.averaging.rows" in state
    for content, names in (
        (state, ["1", "3"]),
        (
            {"state_dict": state, "callbacks": {"old": state}, "epoch": 3},
            ["1", "3", "callbacks.old.1", "callbacks.old.3"],
        ),
        ({"model": state, "ema": state, "step": 5}, ["model.1", "model.3", "ema.1", "ema.3"]),
        (nn.BatchNorm1d(2).state_dict(), [""]),
    ):
        assert [layer.name for layer in inspect_checkpoint(saved(content, tmp_path / "x.pt")).layers] == names


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    """A missing, a damaged, an empty and a foreign file, and one without batch norm, each say so."""
    with pytest.raises(FileNotFoundError, match="there is no file"):
        inspect_checkpoint(tmp_path / "nowhere")
    whole = saved(trained().state_dict(), tmp_path / "whole.pt").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"epoch,loss\n1,0.5\n"):
        (tmp_path / "damaged").write_bytes(content)
        with pytest.raises(CheckpointRefusedError):
            inspect_checkpoint(tmp_path / "damaged")
    with pytest.raises(CheckpointRefusedError, match="no batch-norm layer"):
        inspect_checkpoint(saved(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt"))


def test_drift_against_loops(tmp_path: Path) -> None:
    """Shift and log ratio are those of a loop over channels; the farthest layer is first; what can't be compared is
    named."""
    one, other = trained(), trained()
    first, second = one.state_dict(), other.state_dict()
    for state, extra in ((first, "old"), (second, "new")):
        state[f"{extra}.running_mean"], state[f"{extra}.running_var"] = torch.zeros(2), torch.ones(2)
    first["wide.running_mean"], first["wide.running_var"] = torch.zeros(2), torch.ones(2)
    second["wide.running_mean"], second["wide.running_var"] = torch.zeros(3), torch.ones(3)
    drift = compare_checkpoints(saved(first, tmp_path / "a.pt"), saved(second, tmp_path / "b.pt"))
    assert (drift.only_first, drift.only_second, drift.other_size) == (("old",), ("new",), ("wide",))
    for layer in drift.layers:
        rows = [
            [float(value) for value in state[f"{layer.name}.{key}"]]
            for key in ("running_mean", "running_var")
            for state in (first, second)
        ]
        shifts = [(b - a) / math.sqrt(v + 1e-5) for a, b, v in zip(rows[0], rows[1], rows[2], strict=True)]
        ratios = [math.log((w + 1e-5) / (v + 1e-5)) for v, w in zip(rows[2], rows[3], strict=True)]
        assert layer.mean_shift_max == pytest.approx(max(map(abs, shifts)))
        assert layer.mean_shift_rms == pytest.approx(math.sqrt(sum(s * s for s in shifts) / len(shifts)))
        assert layer.log_variance_ratio_max == pytest.approx(max(map(abs, ratios)))
        assert layer.log_variance_ratio_rms == pytest.approx(math.sqrt(sum(r * r for r in ratios) / len(ratios)))
    worst = [max(layer.mean_shift_rms, layer.log_variance_ratio_rms) for layer in drift.layers]
    assert worst == sorted(worst, reverse=True)
    second["3.running_mean"] = torch.tensor([math.nan, 0.0])
    spoiled = compare_checkpoints(tmp_path / "a.pt", saved(second, tmp_path / "b.pt"))
    assert spoiled.layers[0].name == "3"
    assert spoiled.as_dict()["layers"][0]["mean_shift_rms"] is None
