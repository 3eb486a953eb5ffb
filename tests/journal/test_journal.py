"""The journal: written line by line, read back, cut short, resumed; and within its bounds of size and time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from journals import layer_names, write_rows, write_run

from lightning_bn.grids import Limits
from lightning_bn.journal.lines import FILE_NAME
from lightning_bn.journal.reader import JournalReader, grid_of_layers, grids_of_layer
from lightning_bn.journal.writer import CHANNEL_BUDGET, Journal


def test_pandas_and_json_read_it(tmp_path: Path) -> None:
    """Each line is strict JSON by itself, and the samples make a frame with a row for each layer and step."""
    path = write_run(tmp_path, layers=12, samples=20)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert lines[0]["kind"] == "journal"
    assert lines[0]["version"] == 1
    rows = {line["id"]: line["rows"] for line in lines if line["kind"] == "rows"}
    frames = [
        pd.DataFrame(line["values"]).assign(layer=rows[line["rows"]], step=line["step"])
        for line in lines
        if line["kind"] == "sample" and line["stage"] == "train"
    ]
    table = pd.concat(frames).set_index(["layer", "step"])
    assert len(table) == 12 * 20
    # As write_run plants it: the sixth layer is dead from the seventh sample of twenty on.
    dead = table.loc[layer_names(12)[5], "dead_fraction"]
    assert dead[dead > 0.25].index.min() == 60
    assert (dead.loc[60:] == 1).all()


def test_numbers_survive(tmp_path: Path) -> None:
    """What is read is what was written: to five digits, NaN told from a value that is missing, infinities kept."""
    rows = {
        "a": {"std": 1 / 3, "x": None},
        "b": {"std": float("nan"), "x": float("inf")},
        "c": {"std": None, "x": -2e-30},
    }
    journal = Journal(tmp_path)
    write_rows(journal, "train", 7, 1, rows, rates={"SGD": 0.1}, warming={"std": [0]}, unjudged={"x": [2]})
    reader = JournalReader.of_file(tmp_path / FILE_NAME)
    (sample,) = reader.samples["train"]
    std, x = grid_of_layers([sample], "std"), grid_of_layers([sample], "x")
    np.testing.assert_allclose(std.values[:, 0], [0.33333, math.nan], rtol=1e-6)
    assert (std.layers, std.nans[:, 0].tolist(), std.warming[:, 0].tolist()) == (
        ("a", "b"),
        [False, True],
        [True, False],
    )
    np.testing.assert_allclose(x.values[:, 0], [math.inf, -2e-30], rtol=1e-6)
    for grid, name in ((std, "std"), (x, "x")):
        for row, layer in enumerate(grid.layers):
            own = grids_of_layer([sample], layer)[name]
            np.testing.assert_array_equal(own.values, grid.values[row : row + 1])
            np.testing.assert_array_equal(own.nans, grid.nans[row : row + 1])
            np.testing.assert_array_equal(own.warming, grid.warming[row : row + 1])
    assert "x" not in grids_of_layer([sample], "a")
    assert (sample.step, sample.epoch, sample.rates, sample.warming) == (7, 1, {"SGD": 0.1}, {"std": [0]})
    assert sample.layout.unjudged == {"x": {2}}


@pytest.mark.parametrize("damage", [b"", b"x", b","])
def test_one_layer_of_many_samples(tmp_path: Path, damage: bytes) -> None:
    """Its values, steps and NaNs are those that json reads line by line, also where rows and statistics change, or a
    byte is damaged."""
    generator = np.random.default_rng(0)
    journal = Journal(tmp_path)
    for step in range(400):
        names = ["a", "b"] if step < 150 else ["c", "b", "a"]
        rows = {name: {each: float(generator.normal()) for each in ("std", "mean", "max")} for name in names}
        rows["b"]["mean"] = math.nan if step % 7 == 0 else None if step % 5 == 0 else rows["b"]["mean"]
        rows["b"]["max"] = -math.inf if step % 11 == 0 else rows["b"]["max"]
        if step > 300:
            for row in rows.values():
                del row["std"]
        write_rows(journal, "train", step, 0, rows, warming={"std": [1]} if step < 3 else {})
    path = tmp_path / FILE_NAME
    if damage:
        text = path.read_bytes()
        place = text.index(b'"step":20,') + text[text.index(b'"step":20,') :].index(b'"std":[') + 8
        path.write_bytes(text[:place] + damage + text[place + 1 :])
    expected: dict[str, dict[int, float]] = {"std": {}, "mean": {}, "max": {}}
    known: dict[str, list[str]] = {}
    special = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
    for line in path.read_text().splitlines():
        fields = {} if damage and '"step":20,' in line else json.loads(line)
        if fields.get("kind") == "rows":
            known[fields["id"]] = fields["rows"]
        for name, cells in fields.get("values", {}).items():
            value = cells[known[fields["rows"]].index("b")]
            if value is not None:
                expected[name][fields["step"]] = special.get(value, value)
    grids = grids_of_layer(JournalReader.of_file(path).samples["train"], "b")
    for name, values in expected.items():
        kept = [at for at, step in enumerate(grids[name].first) if not damage or step != 20]
        assert [int(grids[name].first[at]) for at in kept] == list(values)
        np.testing.assert_allclose(grids[name].values[0, kept], list(values.values()), rtol=1e-6)
        np.testing.assert_array_equal(grids[name].nans[0, kept], np.isnan(list(values.values())))
    assert grids["std"].first[grids["std"].warming[0]].tolist() == [0, 1, 2]


def test_each_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    """A journal can be read while it is written."""
    journal = Journal(tmp_path)
    reader = JournalReader()
    for step in range(5):
        before = (tmp_path / FILE_NAME).stat().st_size if step else 0
        journal.write("epoch", step=step, epoch=step)
        reader.feed((tmp_path / FILE_NAME).read_bytes()[before:])
        assert [event["step"] for event in reader.events["epoch"]] == list(range(step + 1))


def test_a_kill_at_any_byte_loses_the_last_line_alone(tmp_path: Path) -> None:
    """Cut anywhere, all whole lines before the cut are read; and a run that goes on behind a cut is read too."""
    whole = write_run(tmp_path / "whole", layers=3, samples=6).read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(200, len(whole), 97):
        path = tmp_path / str(cut) / FILE_NAME
        path.parent.mkdir()
        path.write_bytes(whole[:cut])
        journal = Journal(path.parent)
        journal.write("epoch", step=10**6, epoch=99)
        reader = JournalReader.of_file(path)
        complete = sum(end < cut for end in ends)
        seen = sum(map(len, reader.samples.values())) + sum(map(len, reader.events.values()))
        rows = whole[:cut].count(b'{"kind":"rows"')
        is_whole = whole[cut - 1 : cut] == b"\n" or whole[cut : cut + 1] == b"\n"
        assert reader.events["epoch"][-1]["epoch"] == 99
        assert reader.skipped == (0 if is_whole else 1)
        assert seen + rows >= complete


def test_lines_that_are_no_journal_are_passed_over() -> None:
    """Whatever else is in the file, nothing is raised, and what is a journal's counts."""
    reader = JournalReader()
    junk = (
        b"\x00\xff\n",
        b"[]\n",
        b"{}\n",
        b'{"kind":"sample","stage":"train","values":{}}\n',
        b'{"kind":"epoch","step":"x"}\n',
    )
    reader.feed(b"".join(junk) + b'{"kind":"epoch","step":3,"epoch":0}\n')
    assert reader.skipped == len(junk)
    assert reader.last_step() == 3


def test_a_resumed_run_continues(tmp_path: Path) -> None:
    """What was written behind the checkpoint, and is written again, counts once, as it was written last."""
    for first, resumed, value in ((0, False, 1.0), (3, True, 2.0)):
        journal = Journal(tmp_path)
        journal.write("start", step=first, epoch=0, resumed=resumed)
        for step in range(first, 6):
            write_rows(journal, "train", step, 0, {"bn": {"std": value}})
            journal.write("finding", step=step, code="BN101")
    reader = JournalReader.of_file(tmp_path / FILE_NAME)
    grid = grid_of_layers(reader.samples["train"], "std")
    assert grid.first.tolist() == [0, 1, 2, 3, 4, 5]
    assert grid.values.tolist() == [[1, 1, 1, 2, 2, 2]]
    assert [event["step"] for event in reader.events["finding"]] == [0, 1, 2, 3, 3, 4, 5]
    assert len(reader.events["start"]) == 2


def test_another_run_in_the_same_folder_begins_anew(tmp_path: Path) -> None:
    """A fit that begins at step 0 leaves nothing of the one before on the page."""
    for steps in (9, 2):
        journal = Journal(tmp_path)
        journal.write("start", step=0, epoch=0, resumed=False)
        for step in range(steps):
            write_rows(journal, "train", step, 0, {"bn": {"std": 1.0}})
    assert [each.step for each in JournalReader.of_file(tmp_path / FILE_NAME).samples["train"]] == [0, 1]


@pytest.mark.parametrize("at", [0, 1, 4999, 9999])
def test_thinning_loses_no_short_illness(at: int) -> None:
    """Of 10,000 samples in 300 columns, the one that was sick is seen, whatever the statistic's scale."""
    reader = JournalReader()
    text = "".join(
        json.dumps({"kind": "sample", "stage": "train", "step": step, "epoch": 0, "rows": "r"}, separators=(",", ":"))[
            :-1
        ]
        + ',"values":{"std":[1,%s],"dead":[0.1,%s]}}\n' % (("1e-9", "0.3") if step == at else ("900", "0.2"))
        for step in range(10_000)
    )
    reader.feed(b'{"kind":"rows","id":"r","rows":["a","b"]}\n' + text.encode())
    for name, limits in (("std", Limits(low=1e-3, high=1e3, healthy=1.0, log=True)), ("dead", Limits(high=0.25))):
        thin = grid_of_layers(reader.samples["train"], name).thinned(300, limits)
        assert thin.values.shape == (2, 300)
        sick = limits.sick(thin.values)
        assert sick.sum() == 1
        (row,), (column,) = np.nonzero(sick)
        assert row == 1
        assert thin.first[column] <= at <= thin.last[column]
        assert thin.last[-1] == 9999
        assert (thin.first[1:] == thin.last[:-1] + 1).all()


def test_a_full_disk_ends_the_journal_and_not_the_run(tmp_path: Path) -> None:
    """What can't be written is told once."""
    (tmp_path / FILE_NAME).mkdir()  # as good as a full disk: it can't be opened
    journal = Journal(tmp_path)
    with pytest.warns(UserWarning, match="can't be written and ends here"):
        journal.write("epoch", step=0, epoch=0)
    journal.write("epoch", step=1, epoch=0)


def test_no_directory_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal of all ranks but the first writes nothing."""
    monkeypatch.chdir(tmp_path)
    journal = Journal(None)
    journal.write("epoch", step=0)
    write_rows(journal, "train", 0, 0, {"a": {"std": 1.0}})
    assert not journal.wants_channels("train", 1)
    assert not list(tmp_path.iterdir())


def test_the_default_sampling_of_a_long_run_stays_small(tmp_path: Path) -> None:
    """200 layers of 256 channels over 10,000 steps, every 50th looked at, take less than 20 MB."""
    generator = np.random.default_rng(0)
    journal = Journal(tmp_path)
    names = layer_names(200)
    statistics = [f"statistic_number_{n}" for n in range(22)]
    vectors = {
        name: {"mean": generator.normal(size=256).tolist(), "std": generator.random(256).tolist()} for name in names
    }
    kept = 0
    for number in range(200):
        values = generator.lognormal(size=(200, 22))
        journal.write_sample("train", 50 * number, 0, names, statistics, values, np.ones_like(values, dtype=bool))
        if journal.wants_channels("train", number + 1):
            journal.write_channels("train", 50 * number, number + 1, vectors)
            kept += 1
    assert kept > 5
    size = (tmp_path / FILE_NAME).stat().st_size
    assert size < 20e6
    assert CHANNEL_BUDGET < 20e6 - 200 * 200 * 22 * 9
