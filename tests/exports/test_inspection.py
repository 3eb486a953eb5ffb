"""Files of exported programs: every fault is named, no sound one is accused, and nothing in them runs."""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import warnings
from pathlib import Path

import pytest
import torch
from exported_programs import BATCH, CAP, EXPORTS, FAULTS, made, network, runner
from file_damages import mutated
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn import check_export
from lightning_bn.checkpoints.reading import CheckpointRefusedError
from lightning_bn.cli import main
from lightning_bn.exports.inspection import inspect_export, is_program

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*float16|.*half:UserWarning"),
]

TRAINING: dict[str, set[str] | None] = {
    # What each exporter makes of a model in training mode; None: it refuses.
    "onnx": {"BN402"},
    "onnx, not optimised": {"BN402"},
    "onnx, one file": {"BN402"},
    "older onnx": set(),
    "older onnx, PRESERVE": {"BN401", "BN402"},
    "older onnx, opset 14": {"BN401", "BN402"},
    "torch.export": {"BN401", "BN402", "BN404"},
    "torch.export, decomposed": {"BN401", "BN402", "BN404"},
    "jit.trace": {"BN401", "BN402", "BN404"},
    "jit.script": {"BN401", "BN402", "BN404"},
    "jit.freeze": None,
    "jit.trace, frozen": None,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "best.ckpt"
    torch.save({"state_dict": {f"net.{key}": value for key, value in network().state_dict().items()}}, path)
    return path


SLOW = ("onnx, not optimised", "onnx, one file")
"""By the slow exporter; with ``LIGHTNING_BN_TEST_EXPORTS=all`` each of their faults is made too."""

PAIRS = [
    (name, fault)
    for name in EXPORTS
    for fault in FAULTS
    if name not in SLOW or fault in ("sound", "training mode") or os.environ.get("LIGHTNING_BN_TEST_EXPORTS") == "all"
]


@pytest.mark.parametrize(("name", "fault"), PAIRS)
def test_every_fault_is_named_and_no_sound_program_accused(
    name: str, fault: str, reference: Path, tmp_path: Path
) -> None:
    """From the file and the checkpoint it is of; and running it shows what the file says."""
    if fault == "training mode" and TRAINING[name] is None:
        with pytest.raises(Exception, match="eval"):
            made(name, fault, tmp_path)
        return
    path = made(name, fault, tmp_path)
    health = inspect_export(path, reference)
    codes = {each.rule for each in health.findings if each.level != "info"}
    answers = {each.code for each in check_export(runner(path), network(), BATCH)}
    if fault == "sound":
        assert codes == set(), health.findings
        assert answers == set()
    elif fault == "training mode":
        expected = TRAINING[name] or set()
        assert codes - {"BN403"} == expected  # some exporters move the statistics on their way
        assert ("BN402" in answers) == ("BN402" in expected)
    elif fault == "before recalibration":
        assert codes == {"BN403"}
        assert answers == {"BN403"}
    elif fault == "NaN":
        assert codes & {"BN203", "BN405"}
        assert "BN405" in answers
    elif fault == "half":
        assert codes == {"BN403"}


def test_distances_are_those_that_were_made(reference: Path, tmp_path: Path) -> None:
    """Means of 0.8 and variances of 1.5 times the reference's come back out of the folded weights, per layer."""
    health = inspect_export(made("onnx", "before recalibration", tmp_path), reference)
    folded = {each.layer.removeprefix("net."): each.text for each in health.findings}
    norms = {name: each for name, each in network().named_modules() if isinstance(each, _BatchNorm)}
    assert set(folded) == set(norms)
    for name, layer in norms.items():
        deviation = (layer.running_var.double() + layer.eps).sqrt()
        mean, var = (float(each) for each in re.findall(r"up to (\S+) ", folded[name]))
        # The largest over channels; which eps was folded is found by trial.
        assert mean == pytest.approx(float((0.2 * layer.running_mean.double().abs() / deviation).max()), rel=0.05)
        assert var == pytest.approx(math.log(1.5), rel=0.05)


def test_folded_norms_are_named(tmp_path: Path) -> None:
    """Where the file tells, without a reference."""
    health = inspect_export(made("onnx", "sound", tmp_path))
    (found,) = health.findings
    assert "4 batch norms are folded into the layers before them: body.1, body.4, body.9, head.3" in found.text
    assert [(layer.name, layer.mode) for layer in health.layers] == [("body.6", "running")]


def test_a_cap_is_called_one(reference: Path, tmp_path: Path) -> None:
    """Several variances that are just the largest say what was done to them."""
    health = inspect_export(made("onnx", "half", tmp_path), reference)
    (found,) = [each for each in health.findings if each.rule == "BN403"]
    assert f"Several variances are just {CAP:g}" in found.text


def test_statistics_of_the_batch_by_nodes(tmp_path: Path) -> None:
    """With track_running_stats=False the file says training_mode=0, and computes the batch's statistics itself."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the older exporter, that it is the older one
        torch.onnx.export(net, (BATCH,), str(tmp_path / "x.onnx"), dynamo=False)
    assert "BN401" in {each.rule for each in inspect_export(tmp_path / "x.onnx").findings}
    assert check_export(runner(tmp_path / "x.onnx"), net, BATCH)[0].code == "BN401"


def test_the_command_reads_programs(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """inspect tells program from checkpoint, and takes --reference for programs alone."""
    path = made("jit.trace", "sound", tmp_path)
    assert main(["inspect", str(path), "--reference", str(reference)]) == 0
    assert "normalises with" in capsys.readouterr().out
    assert main(["inspect", str(reference), "--reference", str(reference)]) == 2
    assert main(["inspect", str(path), str(path)]) == 1
    assert "is a program of TorchScript, and no checkpoint" in capsys.readouterr().err


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Bytes that are no ONNX, an archive that is no program, and external data that is missing."""
    (tmp_path / "x.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointRefusedError):
        inspect_export(tmp_path / "x.onnx")
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    assert not is_program(tmp_path / "x.pt")
    path = made("onnx", "sound", tmp_path)
    path.with_name(f"{path.name}.data").unlink()
    health = inspect_export(path)
    assert not health.sound
    assert "its numbers can't be read" in health.findings[0].text


@pytest.mark.parametrize("name", ["older onnx, PRESERVE", "torch.export", "jit.trace", "jit.freeze"])
def test_damage_is_refused_or_told(name: str, reference: Path, tmp_path: Path) -> None:
    """Of a damaged file there is a report or a refusal; an archive with a flipped weight is not sound."""
    content, dice = made(name, "sound", tmp_path).read_bytes(), random.Random(name)
    path = tmp_path / f"damaged{EXPORTS[name][0]}"
    outcomes = set()
    for _ in range(40):
        path.write_bytes(mutated(content, dice))
        try:
            if is_program(path):
                outcomes.add(inspect_export(path, reference).sound)
        except CheckpointRefusedError:
            outcomes.add("refused")
    assert "refused" in outcomes
    if name != "older onnx, PRESERVE":  # which has no checksums
        place = content.index(network().body[8].weight.detach().numpy().tobytes()[:16])
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with contextlib.suppress(CheckpointRefusedError):
            assert not inspect_export(path, reference).sound
