"""What optimisers, converters and quantisers of ONNX files, OpenVINO and AOTInductor make of a network: every fault is
named, and no sound program accused. Each runs where its package is installed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_programs import BATCH, FAULTS, TOOLS, Network, changed, made, network, runner, stretched

from lightning_bn import check_export
from lightning_bn.checkpoints.health import inspect_checkpoint
from lightning_bn.checkpoints.reading import CheckpointRefusedError
from lightning_bn.exports.inspection import inspect_export

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tools, about themselves

TRAINING = {
    "onnxruntime, basic": {"BN401"},  # they drop the dropout, and keep the training norm
    "onnxruntime, extended": {"BN401"},
    "onnxslim": {"BN401"},
}


def saved(net: Network, path: Path) -> Path:
    torch.save({"state_dict": {f"net.{key}": value for key, value in net.state_dict().items()}}, path)
    return path


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", TOOLS)
def test_every_fault_is_named_and_no_sound_program_accused(name: str, fault: str, tmp_path: Path) -> None:
    """In the file that a tool wrote, beside the checkpoint, and in onnxruntime's answers, beside the model."""
    pytest.importorskip(TOOLS[name][0])
    net = stretched(network()) if fault == "half" and "float16" in name else network()
    path, reference = changed(name, fault, tmp_path), saved(net, tmp_path / "best.ckpt")
    found = {each.rule for each in inspect_export(path, reference).findings if each.level != "info"}
    tolerance = 0.1 if "int8" in name else 0.01  # what a quantised program loses anyway
    answers = {each.code for each in check_export(runner(path), net, BATCH, tolerance=tolerance)}
    if fault == "sound":
        assert found == answers == set()
    elif fault == "training mode":
        expected = TRAINING.get(name, {"BN401", "BN402"})
        assert found - {"BN403"} == expected  # the export moved the statistics
        assert answers == {"BN403", "BN402" if "BN402" in expected else "BN401"}
    elif fault == "NaN":
        assert found & {"BN203", "BN405"}
        assert answers == {"BN403" if "int8" in name else "BN405"}  # a NaN is no integer
    else:
        assert found - {None} == {"BN403"}  # None: halved and then folded, of which no number can be compared
        assert answers == {"BN403"}


@pytest.mark.parametrize(
    ("name", "cap"), [("onnxconverter-common, float16", "10000"), ("onnxruntime, float16", "65504")]
)
def test_a_converters_cap_is_called_one(name: str, cap: str, tmp_path: Path) -> None:
    """The real one of two converters, by their defaults."""
    pytest.importorskip(TOOLS[name][0])
    reference = saved(stretched(network()), tmp_path / "best.ckpt")
    findings = inspect_export(changed(name, "half", tmp_path), reference).findings
    (found,) = [each for each in findings if each.rule == "BN403"]
    assert (found.layer, f"Several variances are just {cap}" in found.text) == ("net.body.1", True)


OPENVINO = {
    "sound": set(),
    "training mode": set(),
    "before recalibration": {"BN403"},
    "NaN": {"BN403"},
    "half": {"BN403"},
}
"""It puts a model in eval mode; a NaN is 0 behind its activation."""


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("source", ["file", "model"])
def test_openvino_is_judged_by_its_answers(source: str, fault: str, tmp_path: Path) -> None:
    """From an ONNX file and from the model, saved in float16 as by default, where NaN becomes 65504; a compiled model
    is a callable."""
    openvino = pytest.importorskip("openvino")
    path, net = tmp_path / "program.xml", network()
    if source == "file":
        exported = made("older onnx, PRESERVE", fault, tmp_path)
        if fault == "training mode":
            with pytest.raises(openvino.frontend.OpConversionFailure, match="Training mode is not supported"):
                openvino.convert_model(str(exported))
            return
        program = openvino.convert_model(str(exported))
    else:
        program = openvino.convert_model(spoiled(fault), example_input=BATCH)
    openvino.save_model(program, str(path))
    compiled = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert {each.code for each in check_export(compiled, net, BATCH)} == OPENVINO[fault]
    with pytest.raises(
        CheckpointRefusedError, match=r"is a program of OpenVINO.*check_export\(openvino\.compile_model"
    ):
        inspect_checkpoint(path)


def spoiled(fault: str) -> Network:
    net = copy.deepcopy(network()).train(fault == "training mode")
    norm: Any = net.body[4]
    if fault == "before recalibration":
        norm.running_var.mul_(1.5)
    elif fault == "NaN":
        norm.running_var[2] = float("nan")
    elif fault == "half":
        norm.running_var.clamp_(max=0.01)
    return net


def test_machine_code_is_refused_by_name(tmp_path: Path) -> None:
    """A package of AOTInductor holds no norm that could be read; it takes a compiler to write one."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("model/data/aotinductor/model/c.wrapper.so", b"\x7fELF")
        archive.writestr("model/archive_format", "pt2")
    with pytest.raises(CheckpointRefusedError, match=r"machine code of AOTInductor.*check_export\(torch\._inductor"):
        inspect_checkpoint(tmp_path / "model.pt2")
