"""The table of layers, steps and statistics, and what is read out of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lightning_bn.activations.registry import COLUMNS, STATISTICS
from lightning_bn.activations.sample import WARM_UP, Sample
from lightning_bn.activations.sample_to_table import LayerTable, scalars, worst_layers


def rows(**layers: dict[str, float | None]) -> Sample:
    return Sample.of(layers)


def test_rows_come_back_as_they_went_in() -> None:
    """Layer, stage, step, epoch, then the statistics in the order of COLUMNS, None where one does not apply."""
    table = LayerTable()
    table.append("train", 5, 1, rows(a={"std": 0.5}, b={"nonfinite": 3.0}))
    table.append("val", 6, 1, rows(a={"std": 0.25}))
    found = table.rows()
    assert [list(row) for row in found] == [["layer", "stage", "step", "epoch", *COLUMNS, "warm_up"]] * 3
    assert [(row["layer"], row["stage"], row["step"], row["std"], row["nonfinite"]) for row in found] == [
        ("a", "train", 5, 0.5, None),
        ("b", "train", 5, None, 3.0),
        ("a", "val", 6, 0.25, None),
    ]
    assert table.rows("val") == found[2:]
    assert (table.samples("train"), table.samples("test"), table.last_step()) == (1, 0, 6)


def test_a_grid_has_layers_downwards_and_steps_to_the_right() -> None:
    """Each cell is the value of its layer at its step; layers without the statistic have no row, and gaps are NaN."""
    table = LayerTable()
    table.append("train", 0, 0, rows(a={"std": 1.0}, b={"std": 2.0}, c={}))
    table.append("val", 0, 0, rows(a={"std": 9.0}))
    table.append("train", 10, 0, rows(a={"std": 3.0}, late={"std": 4.0}, b={"std": 5.0}, c={}))
    grid = table.grid("train", "std")
    assert (grid.layers, grid.first.tolist()) == (("a", "late", "b"), [0, 10])
    np.testing.assert_array_equal(grid.values, [[1, 3], [np.nan, 4], [2, 5]])


@pytest.mark.parametrize("samples", [7, 50, 149, 1000])
def test_thinning_keeps_the_worst(samples: int) -> None:
    """However many samples a column stands for, it has the value farthest from healthy among them, and an illness of
    one step is seen."""
    generator = np.random.default_rng(0)
    values = np.exp(generator.normal(size=samples))
    values[samples // 2] = 1e6
    table = LayerTable()
    for step, value in enumerate(values):
        table.append("train", step, 0, rows(a={"std": float(value)}))
    thin = table.grid("train", "std").thinned(50, STATISTICS["std"])
    assert len(thin.first) == min(samples, 50)
    assert 1e6 in thin.values
    for column, start in enumerate(thin.first):
        end = thin.first[column + 1] if column + 1 < len(thin.first) else samples
        assert thin.values[0, column] == max(values[start:end], key=lambda value: abs(np.log(value)))


def test_episodes_have_a_beginning_an_end_and_a_peak() -> None:
    """An episode lasts over the unbroken samples beyond the limit, and is remembered when it is over."""
    history = {
        "a": [0, 0, 0.4, 1, 0.3],
        "b": [0.9, 0.9, 0.9, 0.9, 0.9],
        "c": [1, 0.5, 0, 0, 1],
        "d": [0, 0, 0.2, 0.2, 0],
    }
    table = LayerTable()
    for step in range(5):
        found = {layer: {"dead_fraction": float(values[step])} for layer, values in history.items()}
        table.append("train", 10 * step, 0, rows(**found))
    assert [(e.layer, e.first, e.last, e.peak, e.value, e.recovered) for e in table.episodes("train")] == [
        ("b", 0, 40, 0.9, 0.9, False),
        ("c", 0, 10, 1.0, 0.5, True),
        ("a", 20, 40, 1.0, 0.3, False),
        ("c", 40, 40, 1.0, 1.0, False),
    ]
    assert all((e.statistic, e.stage, e.limit) == ("dead_fraction", "train", 0.25) for e in table.episodes())
    assert [e.order for e in table.episodes()] == [1, 2, 0, 2]
    assert table.episodes("val") == []


def test_a_layer_that_did_not_run_keeps_its_illness() -> None:
    """A sample without the layer tells neither of an end nor of a new beginning."""
    table = LayerTable()
    for step, values in enumerate(({"std": 1e4}, None, {"std": 1e5}, {"std": 1.0})):
        table.append("train", step, 0, rows(a={"std": 1.0}, **({} if values is None else {"late": values})))
    (episode,) = table.episodes()
    assert (episode.layer, episode.first, episode.last, episode.peak, episode.recovered) == ("late", 0, 2, 1e5, True)


def test_a_layer_of_which_only_nan_is_left_keeps_its_illness() -> None:
    """An explosion that ends in NaN is not over."""
    table = LayerTable()
    for step, found in enumerate(({"std": 1e4}, {"std": math.nan, "nonfinite": 64.0})):
        table.append("train", step, 0, rows(a=found))
    assert [(e.statistic, e.first, e.last, e.recovered) for e in table.episodes()] == [
        ("std", 0, 0, False),
        ("nonfinite", 1, 1, False),
    ]


def test_new_layers_come_where_they_were_called() -> None:
    """A place that is reached later has its row between the ones that it was called between."""
    table = LayerTable()
    healthy = {"std": 1.0}
    table.append("train", 0, 0, rows(a=healthy, d=healthy))
    table.append("train", 1, 0, rows(a=healthy, b=healthy, c=healthy, d=healthy))
    table.append("train", 2, 0, rows(z=healthy, d=healthy))
    assert table.grid("train", "std").layers == ("z", "a", "b", "c", "d")


def test_scalars_stand_for_all_layers() -> None:
    """Worst is the layer farthest from healthy, by ratio for a scale; missing values don't count."""
    sample = rows(a={"std": 0.1, "dead_fraction": 0.0}, b={"std": 5.0, "dead_fraction": 0.5}, c={"std": 1.0}, d={})
    found = scalars(sample, lambda module: module == "b")
    assert found == {
        "std/worst": 0.1,
        "std/median": 1.0,
        "std/smallest": 0.1,
        "std/largest": 5.0,
        "std/b": 5.0,
        "dead_fraction/worst": 0.5,
        "dead_fraction/median": 0.25,
        "dead_fraction/b": 0.5,
    }
    numbered = scalars(sample, None, {"z": 0, "a": 1, "b": 2, "c": 3, "d": 4})
    assert (numbered["std/worst_layer"], numbered["dead_fraction/worst_layer"]) == (1.0, 2.0)
    behind = scalars(rows(d={}, a={"std": 1.0}, b={"std": 9.0}), None, {"d": 0, "a": 1, "b": 2})
    assert behind["std/worst_layer"] == 2.0
    assert [(statistic.name, layer, value) for statistic, layer, value in worst_layers(sample)] == [
        ("std", "a", 0.1),
        ("dead_fraction", "b", 0.5),
    ]


def test_a_layer_without_a_finite_value_is_the_worst() -> None:
    """Its scalar is NaN and never 0; the median is that of the others; the CSV tells it from what does not apply."""
    nan = float("nan")
    sample = rows(a={"std": 1.0, "zero_fraction": 0.5}, b={"std": nan, "zero_fraction": nan}, c={"std": 3.0})
    found = scalars(sample, lambda module: True)
    assert np.isnan([found[name] for name in ("std/worst", "std/b", "zero_fraction/worst", "zero_fraction/b")]).all()
    assert (found["std/median"], found["std/largest"], found["zero_fraction/median"]) == (2.0, 3.0, 0.5)
    assert "zero_fraction/c" not in found
    assert [(statistic.name, layer) for statistic, layer, _ in worst_layers(sample)] == [
        ("std", "b"),
        ("zero_fraction", "b"),
    ]


def test_warm_up_is_no_illness() -> None:
    """A cell in warm-up is beyond its limits without an episode, and the table says so."""
    sample = rows(a={"drift_var": 5.0}, b={"drift_var": 5.0})
    sample.states[0, COLUMNS.index("drift_var")] = WARM_UP
    table = LayerTable()
    table.append("train", 0, 0, sample)
    assert [episode.layer for episode in table.episodes()] == ["b"]
    assert [row["warm_up"] for row in table.rows()] == ["drift_var", ""]


def test_only_rows_with_limits_are_counted_also_in_a_run_that_goes_on() -> None:
    """A linear layer of which the step alone is measured is in the table, and in no verdict."""
    table, resumed = LayerTable(), LayerTable()
    table.append("train", 0, 0, rows(norm={"std": 1.0}, linear={"update_ratio": 0.1}))
    resumed.load_state_dict(table.state_dict())
    assert table.verdict() == resumed.verdict()
    assert table.verdict()[0].startswith("Healthy: 1 layers were")


def test_the_worst_gradient_is_the_one_unlike_the_others() -> None:
    """A gradient has no healthy scale in itself: the worst is farthest from the median over the layers, vanishing or
    exploding."""
    vanishing = rows(a={"grad_std": 1e-9}, b={"grad_std": 1e-3}, c={"grad_std": 2e-3})
    exploding = rows(a={"grad_std": 1e-4}, b={"grad_std": 1e-3}, c={"grad_std": 1e5})
    assert (scalars(vanishing)["grad_std/worst"], scalars(exploding)["grad_std/worst"]) == (1e-9, 1e5)


def test_the_csv_is_the_table(tmp_path: Path) -> None:
    """pandas reads the file in one line, and finds the table, to six digits; it goes on where it ended."""
    table = LayerTable()
    generator = np.random.default_rng(0)
    for step in range(3):
        values = generator.normal(size=len(COLUMNS))
        named = {"a,b": dict(zip(COLUMNS, values, strict=True)), "100%s, %d": {"std": 1e-30}}
        table.append("train", step, 0, rows(**named))
        table.append_csv(tmp_path / "stats.csv")
    read = pd.read_csv(tmp_path / "stats.csv")
    expected = pd.DataFrame(table.rows()).astype(dict.fromkeys(COLUMNS, float))
    assert read.pop("warm_up").isna().all()
    assert set(expected.pop("warm_up")) == {""}
    pd.testing.assert_frame_equal(read.astype(dict.fromkeys(COLUMNS, float)), expected, rtol=1e-5, check_dtype=False)


def test_every_limit_can_be_reached_and_met() -> None:
    """No statistic is sick when it is healthy, and each that has a limit can be."""
    limitless = {"kurtosis", "effective_rank", "grad_norm", "update_ratio"}
    for statistic in STATISTICS.values():
        assert not statistic.sick(np.array([1.0 if statistic.healthy is None else statistic.healthy, np.nan])).any()
        assert statistic.sick(np.array([np.inf])).all() == (statistic.name not in limitless)
