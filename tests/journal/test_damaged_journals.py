"""Journals with damaged bytes: what is lost is the line that has them, and never the page."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from journals import write_run

from lightning_bn.dashboard.report import report_html
from lightning_bn.journal.lines import decode
from lightning_bn.journal.reader import JournalReader, grid_of_layers, grids_of_layer


def test_one_damaged_number_loses_one_sample(tmp_path: Path) -> None:
    """Of the statistic that has it, in that sample; every other number is what it was, and nothing is another row's."""
    path = write_run(tmp_path, layers=4, samples=8)
    good = path.read_bytes()
    before = JournalReader.of_file(path).samples["train"]
    statistic = before[3].statistics[0]
    line = next(each for each in good.split(b"\n") if b'"sample","stage":"train"' in each and b'"step":30,' in each)
    place = good.index(line) + line.index(b'"values":{') + line[line.index(b'"values":{') :].index(b",")
    for byte in b'x",]}0':  # a letter, the end of a text, of a list, of an object; two numbers that become one
        path.write_bytes(good[:place] + bytes([byte]) + good[place + 1 :])
        after = JournalReader.of_file(path).samples["train"]
        grid, expected = grid_of_layers(after, statistic), grid_of_layers(before, statistic)
        kept = [list(expected.first).index(step) for step in grid.first]
        assert len(kept) >= len(before) - 1
        for column, step in enumerate(grid.first):
            if step != 30:
                np.testing.assert_array_equal(grid.values[:, column], expected.values[:, kept[column]])
        damaged = next((each for each in after if each.step == 30), None)
        for row, layer in enumerate(before[3].rows):
            own = None if damaged is None else grids_of_layer([damaged], layer).get(statistic)
            value = grid_of_layers([before[3]], statistic).values[row, 0]
            assert own is None or own.values[0, 0] == value or np.isnan(own.values[0, 0])
        assert "<html" in report_html({"run": path})


def test_a_damaged_line_of_names_leaves_the_numbers(tmp_path: Path) -> None:
    """The rows have numbers for names."""
    path = write_run(tmp_path, layers=4, samples=8)
    path.write_bytes(path.read_bytes().replace(b'{"kind":"rows"', b'{"kind"x"rows"'))
    samples = JournalReader.of_file(path).samples["train"]
    assert len(samples) == 8
    assert samples[0].rows == ("row 1", "row 2", "row 3", "row 4")
    assert samples[0].column(samples[0].statistics[0]) is not None


def test_no_damage_ends_the_report(tmp_path: Path) -> None:
    """One to three bytes of any line, at random."""
    path, dice = write_run(tmp_path, layers=3, samples=4), random.Random(0)
    good = path.read_bytes()
    for _ in range(40):
        content = bytearray(good)
        for _ in range(dice.choice((1, 1, 1, 3))):
            content[dice.randrange(len(content))] = dice.choice((dice.randrange(256), *b'0123x",:[]{}-en'))
        path.write_bytes(content)
        assert "<html" in report_html({"run": path})


@pytest.mark.parametrize("number", [b"NaN", b"-Infinity", b"1e999"])
def test_a_number_that_json_has_not_is_damage(number: bytes) -> None:
    """What strict JSON does not know was never written; as text, in quotes, it was."""
    with pytest.raises(ValueError, match=number.decode()):
        decode(b'{"kind":"note","step":1,"seen":%b}' % number)
    assert decode(b'{"kind":"note","step":1,"seen":"%b"}' % number)["seen"] == number.decode()
