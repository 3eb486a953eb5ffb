"""One network exported in each way, sound and with each of four faults: what `lightning-bn inspect --reference` finds
in the file, and `check_export` in the answers. A table of docs/exporting.md. What is not installed is left out.

    python benchmarks/exported_faults.py [NAME ...]
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from exported_programs import BATCH, EXPORTS, FAULTS, TOOLS, changed, made, network, runner, stretched

from lightning_bn import check_export
from lightning_bn.exports.inspection import inspect_export


def cell(name: str, fault: str, folder: Path) -> str:
    """The codes by the file and, behind a stroke, by the answers."""
    real = fault == "half" and "float16" in name
    net = stretched(network()) if real else network()
    try:
        path = made(name, fault, folder) if name in EXPORTS else changed(name, fault, folder)
    except Exception:  # of an exporter that takes no such model
        return "refuses"
    torch.save({"state_dict": net.state_dict()}, folder / "best.ckpt")
    found = inspect_export(path, folder / "best.ckpt").findings
    tolerance = 0.1 if "int8" in name else 0.01
    answers = check_export(runner(path), net, BATCH, tolerance=tolerance)
    return " / ".join(codes(each) for each in ((f.rule for f in found if f.level != "info"), (f.code for f in answers)))


def codes(found: Iterable[Any]) -> str:
    return " ".join(sorted({str(code or "not compared").removeprefix("BN") for code in found})) or "-"


def of_openvino(fault: str, folder: Path) -> str:
    """From the ONNX file, saved in float16, which is its default."""
    import openvino

    try:
        program = openvino.convert_model(str(made("older onnx, PRESERVE", fault, folder)))
    except openvino.frontend.OpConversionFailure:
        return "refuses"
    openvino.save_model(program, str(folder / "model.xml"))
    compiled = openvino.compile_model(str(folder / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return f"- / {codes(each.code for each in check_export(compiled, network(), BATCH))}"


def main() -> None:
    warnings.simplefilter("ignore")
    print("| export |", " | ".join(FAULTS), "|")
    print("|---" * (1 + len(FAULTS)), end="|\n")
    with tempfile.TemporaryDirectory() as folder:
        for name in (*EXPORTS, *(name for name, (package, _) in TOOLS.items() if find_spec(package))):
            if sys.argv[1:] and name not in sys.argv[1:]:
                continue
            print(f"| {name} |", " | ".join(cell(name, fault, Path(folder)) for fault in FAULTS), "|", flush=True)
        if find_spec("openvino") and (not sys.argv[1:] or "OpenVINO" in sys.argv[1:]):
            print("| OpenVINO |", " | ".join(of_openvino(fault, Path(folder)) for fault in FAULTS), "|")


if __name__ == "__main__":
    main()
