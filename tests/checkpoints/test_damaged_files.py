"""Damaged files, made at random: no traceback, and no "sound" for what was lost."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from file_damages import FORMATS, NET, mutated

from lightning_bn.checkpoints.health import LayerHealth, inspect_checkpoint
from lightning_bn.checkpoints.reading import CheckpointRefusedError

MUTATIONS = int(os.environ.get("LIGHTNING_BN_TEST_MUTATIONS", "60"))
"""A format. By hand: ``LIGHTNING_BN_TEST_MUTATIONS=400 pytest tests/checkpoints/test_damaged_files.py``."""

CHECKED = ("torch.save", "torch.save, with a Path", "a pickled module", "npz")
"""These have checksums, so what is sound has the numbers that were written."""


@pytest.mark.parametrize("form", FORMATS)
def test_damage_is_refused_or_told(form: str, tmp_path: Path) -> None:
    """Of a file with one to three damages both layers are read, or it isn't sound; what is said is one line of text."""
    path, dice = tmp_path / "x", random.Random(form)
    path.write_bytes(FORMATS[form])
    expected = inspect_checkpoint(path)
    assert expected.sound
    assert len(expected.layers) == 2
    outcomes, said = set(), []
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(FORMATS[form], dice))
        try:
            health = inspect_checkpoint(path)
        except CheckpointRefusedError as refused:
            said.append(str(refused))
            outcomes.add("refused")
            continue
        said += [text for each in health.findings for text in (each.text, each.layer)]
        outcomes.add("sound" if health.sound else "unsound")
        if health.sound and form in CHECKED:
            assert _numbers(health.layers) == _numbers(expected.layers)
        elif health.sound:
            assert len(health.layers) == 2
    assert {"refused", "sound"} <= outcomes
    assert all(text.isprintable() for text in said)


def _numbers(layers: tuple[LayerHealth, ...]) -> list[tuple[object, ...]]:
    return [(each.channels, each.batches_tracked, each.mean_min, each.var_max, each.weight_min) for each in layers]


@pytest.mark.parametrize("form", CHECKED)
def test_any_flipped_bit_of_the_statistics_is_found(form: str, tmp_path: Path) -> None:
    """Where the file has checksums."""
    content = FORMATS[form]
    place = content.index(NET[1].running_mean.numpy().tobytes())
    for bit in (0, 9, 100, 8 * 8 * 4 - 1):
        flipped = bytearray(content)
        flipped[place + bit // 8] ^= 1 << bit % 8
        (tmp_path / "x").write_bytes(flipped)
        health = inspect_checkpoint(tmp_path / "x")
        assert not health.sound
        assert "the file is damaged" in health.findings[0].text or "can't be read" in health.findings[0].text
