"""Which candidate did best, and how that is told."""

from __future__ import annotations

import math

import pytest

from lightning_bn.comparison.scores import Scores


def scored(mode: str, values: dict[str, list[float]]) -> Scores:
    scores = Scores("val_loss", mode)
    for row in zip(*values.values(), strict=True):
        scores.add(dict(zip(values, row, strict=True)))
    return scores


@pytest.mark.parametrize(("mode", "best", "worst"), [("min", "b", 5.0), ("max", "a", 1.0)])
def test_mean_and_worst(mode: str, best: str, worst: float) -> None:
    """The best has the best mean; the worst value is the largest of a loss and the smallest of an accuracy."""
    scores = scored(mode, {"a": [3.0, 5.0, 1.0], "b": [2.0, 2.0, 2.0]})
    assert (scores.mean("a"), scores.worst("a"), scores.best) == (3.0, worst, best)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_is_the_worst(mode: str) -> None:
    """A candidate with a NaN is never recommended, and NaN is no improvement on anything."""
    scores = scored(mode, {"a": [math.nan, 1.0], "b": [5.0, 5.0], "c": [6.0, 4.0]})
    assert scores.best == "b"
    assert math.isnan(scores.worst("a"))
    assert not scores.better(math.nan, 1.0)
    assert scores.better(1.0, math.nan)
    assert not scores.better(math.nan, math.nan)


def test_the_table_is_aligned_with_the_best_on_top() -> None:
    """One line a candidate, by mean; the mark stands at the first."""
    lines = str(scored("max", {"short": [0.5, 0.7], "a longer name": [0.9, 0.2]})).splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == ["val_loss", "short", "a longer name"]
    assert lines[1].endswith("<- best mean")
    assert len(lines[0]) == len(lines[2]) == lines[1].index("  <-")


def test_nothing_yet() -> None:
    """No evaluation, no best, a table of its header alone."""
    scores = Scores("val_loss", "min")
    assert scores.best is None
    assert str(scores) == "val_loss  mean  worst  last"


def test_an_unknown_mode() -> None:
    """The message says what the two modes mean."""
    with pytest.raises(ValueError, match="'min' where a small val_loss is good"):
        Scores("val_loss", "down")
