"""Journals of runs that never were: sick, healthy, large, hostile, cut short."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_bn.activations.description import describe_statistics
from lightning_bn.journal.lines import FILE_NAME
from lightning_bn.journal.writer import Journal

HOSTILE = ("<img src=x onerror=window.hacked=1>", '"><script>window.hacked=1</script>', "layer,with\nline")


RULE = """### BN102 A submodule in eval mode

Its `running_mean` stands still, see [the guide](guide.md).

```python
model.train()
```"""


def layer_names(count: int) -> list[str]:
    """Names as a residual network has them: stages of blocks of a norm and an activation each."""
    return [f"model.layer{n // 24 + 1}.{n // 4 % 6}.{('bn1', 'relu#1', 'bn2', 'relu#2')[n % 4]}" for n in range(count)]


def write_rows(
    journal: Journal, stage: str, step: int, epoch: int, rows: Mapping[str, Mapping[str, float | None]], **places: Any
) -> None:
    """Write a sample that is given by row and statistic; None where a statistic does not apply."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    values = np.array([[row.get(name) for name in columns] for row in rows.values()], dtype=float)
    has_value = np.array([[row.get(name) is not None for name in columns] for row in rows.values()], dtype=bool)
    journal.write_sample(stage, step, epoch, list(rows), columns, values, has_value, **places)


def write_run(
    folder: Path,
    *,
    layers: int | Sequence[str] = 16,
    samples: int = 60,
    every: int = 10,
    sick: str | None = "dead",
    end: str | None = "finished",
    events: bool = True,
    seed: int = 0,
) -> Path:
    """Write a journal and return its path.

    With ``sick="dead"`` the sixth layer's dead fraction goes to 1 at a third of the run, and those of the two below it
    follow; the second layer's drift is beyond its limit from a tenth to a fifth. ``sick="nan"``: the fourth layer is
    NaN from the half on. ``sick="blip"``: the second layer is dead at one sample, three quarters into the run.
    """
    names = layer_names(layers) if isinstance(layers, int) else list(layers)
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder)
    journal.write("start", time=1.7e9, step=0, epoch=0, resumed=False)
    journal.write("statistics", statistics=describe_statistics(), histogram_edges=[-2.0, -1.0, 0.0, 1.0, 2.0])
    journal.write("layers", layers=[_described(name) for name in names])
    onset = samples // 3
    for number in range(samples):
        step = number * every
        if number % max(1, samples // 6) == 0:
            journal.write("epoch", step=step, epoch=number // max(1, samples // 6))
        rows = {name: _values(name, place, number, samples, sick, generator) for place, name in enumerate(names)}
        warming = {"drift_var": list(range(len(names)))} if number < 2 else {}
        rate = 0.1 if number < samples // 2 else 0.01
        write_rows(journal, "train", step, number * 6 // samples, rows, rates={"SGD": rate}, warming=warming)
        if journal.wants_channels("train", number + 1):
            journal.write_channels("train", step, number + 1, {name: _channels(generator) for name in names[:64]})
        if number % max(1, samples // 6) == max(1, samples // 6) - 1:
            journal.write("validation", step=step + 1, epoch=number * 6 // samples)
            write_rows(journal, "val", step + 1, number * 6 // samples, rows)
    if sick == "dead" and len(names) > 8:
        _illness(journal, names, onset * every, samples, every)
    if events:
        _events(journal, names, samples * every)
    if end:
        journal.write("end", time=1.7e9 + samples, step=samples * every, status=end)
    return folder / FILE_NAME


def _described(name: str) -> dict[str, Any]:
    norm = "bn" in name
    return {"name": name, "class": "BatchNorm2d" if norm else "ReLU", "channels": 16 if norm else None}


def _values(
    name: str, place: int, number: int, samples: int, sick: str | None, generator: np.random.Generator
) -> dict[str, float | None]:
    noise = float(generator.random())
    dead = 1.0 if sick == "dead" and 5 <= place <= 7 and number >= samples // 3 else 0.02 * noise
    if sick == "blip" and place == 1 and number == samples * 3 // 4:
        dead = 1.0
    drifts = sick == "dead" and place == 1 and samples // 10 <= number < samples // 5
    broken = sick == "nan" and place >= 3 and number >= samples // 2
    row: dict[str, float | None] = {
        "mean": float("nan") if broken else noise - 0.5,
        "std": float("nan") if broken else 1.0 + 0.2 * noise,
        "abs_max": float("inf") if broken else 4.0 + noise,
        "zero_fraction": 0.5 + 0.1 * noise if "relu" in name else 0.0,
        "dead_fraction": dead,
        "nonfinite": 64.0 if broken else 0.0,
    }
    if "bn" in name:
        row |= {
            "drift_mean": 0.1 * noise,
            "drift_var": 1.7 if drifts else 0.2 * noise,
            "weight_min": 0.9,
            "weight_max": 1.1,
        }
    return row


def _channels(generator: np.random.Generator) -> dict[str, list[float]]:
    drift = {"drift_mean": [0.1] * 5 + [1.5] + [0.2] * 10, "drift_var": [0.0] * 16}
    return {"mean": generator.normal(size=16).tolist(), "std": generator.random(16).tolist(), "dead": [3.0], **drift}


def _illness(journal: Journal, names: list[str], onset: int, samples: int, every: int) -> None:
    last = samples * every
    for place in (5, 6, 7):
        journal.write(
            "episode",
            layer=names[place],
            statistic="dead_fraction",
            stage="train",
            first=onset,
            last=last,
            peak=1.0,
            recovered=False,
            cause=None if place == 5 else [names[5], "dead_fraction", onset],
            why="A channel that is always zero gets no gradient, and stays so.",
            fix="optimizer = torch.optim.SGD(model.parameters(), lr=0.01)",
            step=onset,
        )
    journal.write(
        "episode",
        layer=names[1],
        statistic="drift_var",
        stage="train",
        first=samples // 10 * every,
        last=(samples // 5 - 1) * every,
        peak=1.7,
        recovered=True,
        step=samples // 10 * every,
    )


def _events(journal: Journal, names: list[str], end: int) -> None:
    journal.write(
        "finding",
        code="BN102",
        level="error",
        title="a layer that learns is in eval mode while training",
        layers=names[:1],
        where=names[0],
        stage="train",
        step=end // 2,
        seen=f"{names[0]} ran in eval mode at step {end // 2}",
        why="Its statistics stand still.",
        fix={"code": "self.train()", "place": "before fit", "note": ""},
        link="lightning-bn rules BN102",
        quiet="ModeCheck(ignore=['BN102'])",
        mended=False,
        follows=None,
    )
    journal.write("rule", step=end // 2, code="BN102", text=RULE)
    journal.write("unseen", step=1, stage="train", layers={"model.head.relu": "no forward called it as a module"})
    journal.write("modes", step=end // 2, eval=names[:1])
    journal.write("modes", step=end * 2 // 3, eval=[])
    for number in range(1, 4):
        metrics = {
            n: {"val_loss": v / number, "val_acc": 1 - v / number}
            for n, v in (("own", 0.9), ("window 20", 0.6), ("recalibrated", 0.4), ("batch", 0.3))
        }
        journal.write(
            "averages",
            step=end * number // 3,
            monitor="val_loss",
            mode="min",
            metrics=metrics,
            recommended="recalibrated",
            advice="BatchNormRecalibration(when='validation')",
        )
    layers = [
        {"name": n, "kind": "BatchNorm2d", "samples": 512, "batches": 16, "mean_shift_max": 0.8, "mean_shift_rms": 0.3}
        | {"log_variance_ratio_max": 0.5, "log_variance_ratio_rms": 0.2, "standard_error": 0.01}
        for n in names
        if "bn" in n
    ]
    report = {"batches": 16, "samples": 512, "skipped": 0, "stopped_by": "end", "not_run": [], "layers": layers}
    journal.write(
        "recalibration", step=end, when="fit_end", metric="val_loss", before=0.9, after=0.4, kept=True, report=report
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_run(folder / "sick")
    write_run(folder / "healthy", sick=None, events=False)
    write_run(folder / "nan", sick="nan", events=False)
    write_run(folder / "large160", layers=160, samples=2000)
    write_run(folder / "large1000", layers=1000, samples=100)
    write_run(folder / "long", layers=12, samples=10_000)
    write_run(folder / "hostile <b>run", layers=[*HOSTILE, *layer_names(9)])
    write_run(folder / "one", layers=1, sick=None, end=None)


if __name__ == "__main__":
    main()
