"""The same network exported in every way that a CPU has here, sound and with each fault."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_bn import exporting

__all__ = ["BATCH", "EXPORTS", "FAULTS", "TOOLS", "changed", "made", "network", "runner", "stretched"]


class Network(nn.Module):
    """Convolutions of every kind and linear layers before norms of several eps; one norm that nothing can fold."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.BatchNorm2d(8, eps=1e-3),
            nn.ReLU(),
            nn.BatchNorm2d(8),
            nn.Dropout(0.5),
            nn.ConvTranspose2d(8, 6, 2, groups=2),
            nn.BatchNorm2d(6),
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))  # type: ignore[no-any-return]


def network() -> Network:
    """A network whose statistics fit data with a mean of 1 and a deviation of 2."""
    torch.manual_seed(0)
    net = Network()
    for parameter in net.parameters():
        if parameter.dim() == 1:  # affine weights and biases of their own
            parameter.data.uniform_(0.5, 1.5)
    for _ in range(30):
        net(torch.randn(16, 3, 8, 8) * 2 + 1)
    return net.eval()


BATCH = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 + 1


def _onnx(path: Path, **how: Any) -> Callable[[nn.Module], None]:
    def export(net: nn.Module) -> None:
        old = not how.get("dynamo", True)
        names: dict[str, Any] = (
            {"input_names": ["images"], "output_names": ["answers"], "dynamic_axes": {"images": {0: "n"}}}
            if old
            else {"dynamic_shapes": ({0: torch.export.Dim("n", min=2)},), "verbose": False}
        )
        torch.onnx.export(net, (BATCH,), str(path), **names, **how)

    return export


def _program(path: Path, *, decompose: bool = False) -> Callable[[nn.Module], None]:
    def export(net: nn.Module) -> None:
        program = torch.export.export(net, (BATCH,))
        torch.export.save(program.run_decompositions() if decompose else program, path)

    return export


_TRAINING = torch.onnx.TrainingMode
EXPORTS: dict[str, tuple[str, Callable[[Path], Callable[[nn.Module], None]]]] = {
    "onnx": (".onnx", lambda path: _onnx(path, dynamo=True)),
    "onnx, not optimised": (".onnx", lambda path: _onnx(path, dynamo=True, optimize=False)),
    "onnx, one file": (".onnx", lambda path: _onnx(path, dynamo=True, external_data=False)),
    "older onnx": (".onnx", lambda path: _onnx(path, dynamo=False, training=_TRAINING.EVAL)),
    "older onnx, PRESERVE": (".onnx", lambda path: _onnx(path, dynamo=False, training=_TRAINING.PRESERVE)),
    "older onnx, opset 14": (
        ".onnx",
        lambda path: _onnx(path, dynamo=False, training=_TRAINING.PRESERVE, opset_version=14),
    ),
    "torch.export": (".pt2", _program),
    "torch.export, decomposed": (".pt2", lambda path: _program(path, decompose=True)),
    "jit.trace": (".pt", lambda path: lambda net: torch.jit.save(torch.jit.trace(net, BATCH, check_trace=False), path)),
    "jit.script": (".pt", lambda path: lambda net: torch.jit.save(torch.jit.script(net), path)),
    "jit.freeze": (".pt", lambda path: lambda net: torch.jit.save(torch.jit.freeze(torch.jit.script(net)), path)),
    "jit.trace, frozen": (
        ".pt",
        lambda path: lambda net: torch.jit.save(torch.jit.freeze(torch.jit.trace(net, BATCH, check_trace=False)), path),
    ),
}
"""By name, a file's ending and what writes a network to a path."""

CAP = 0.0625
"""Variances above it are stored as it, by what halves a file; 10,000 in a real converter."""

FAULTS = ("sound", "training mode", "before recalibration", "NaN", "half")


def made(name: str, fault: str, folder: Path) -> Path:
    """Export the network with a fault; return the file."""
    ending, writer = EXPORTS[name]
    path = folder / f"program{ending}"
    net = copy.deepcopy(network())
    if fault == "stretched":
        stretched(net)
    elif fault == "training mode":
        net.train()
    elif fault == "before recalibration":
        for norm in _norms(net):
            norm.running_mean.mul_(0.8)  # type: ignore[union-attr]
            norm.running_var.mul_(1.5)  # type: ignore[union-attr]
    elif fault == "NaN":
        _norms(net)[1].running_var[2] = float("nan")  # type: ignore[index]
    elif fault == "capped" or (fault == "half" and ending != ".onnx"):
        for norm in _norms(net):
            norm.running_var.clamp_(max=CAP)  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        if fault == "training mode" or ".onnx" not in ending:
            writer(path)(net)
        else:
            with exporting(net):
                writer(path)(net)
    if fault == "half" and ending == ".onnx":
        _halved(path)
    return path


def stretched(net: Network) -> Network:
    """The same function of the images with variances above 100,000 in its first norm, as inputs that were never
    scaled leave them; converters to float16 store them as 10,000 or 65,504."""
    with torch.no_grad():
        net.body[0].weight.mul_(_STRETCH)
        net.body[1].running_mean.mul_(_STRETCH)
        net.body[1].running_var.mul_(_STRETCH**2)
    return net


_STRETCH = 300.0


@functools.cache
def _exported(fault: str) -> bytes:
    """An ONNX file that still has its norms and the mode of each, for tools that change such files."""
    with tempfile.TemporaryDirectory() as folder:
        return made("older onnx, PRESERVE", fault, Path(folder)).read_bytes()


def _in_memory(module: str, change: Callable[[Any, Any], Any]) -> Callable[[Path, Path], None]:
    def tool(path: Path, to: Path) -> None:
        onnx.save(change(importlib.import_module(module), onnx.load(str(path))), str(to))

    return tool


def _by_onnxruntime(level: Any) -> Callable[[Path, Path], None]:
    def tool(path: Path, to: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.optimized_model_filepath = level, str(to)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    return tool


def _in_int8(path: Path, to: Path) -> None:
    importlib.import_module("onnxruntime.quantization").quantize_dynamic(str(path), str(to))


def _half(tool: Any, model: Any) -> Any:
    return tool.convert_float_to_float16(model, keep_io_types=True)


_LEVEL = onnxruntime.GraphOptimizationLevel
TOOLS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "onnxruntime, basic": ("onnxruntime", _by_onnxruntime(_LEVEL.ORT_ENABLE_BASIC)),
    "onnxruntime, extended": ("onnxruntime", _by_onnxruntime(_LEVEL.ORT_ENABLE_EXTENDED)),
    "onnxruntime, int8": ("onnxruntime", _in_int8),
    "onnxruntime, float16": ("onnxruntime", _in_memory("onnxruntime.transformers.float16", _half)),
    "onnxconverter-common, float16": ("onnxconverter_common", _in_memory("onnxconverter_common.float16", _half)),
    "onnxslim": ("onnxslim", _in_memory("onnxslim", lambda tool, model: tool.slim(model))),
    "onnxsim": ("onnxsim", _in_memory("onnxsim", lambda tool, model: tool.simplify(model)[0])),
    "onnxoptimizer": ("onnxoptimizer", _in_memory("onnxoptimizer", lambda tool, model: tool.optimize(model))),
}
"""By name, the package and what reads an ONNX file and writes another."""


def changed(name: str, fault: str, folder: Path) -> Path:
    """Run a tool on the exported network with a fault; return the file that it writes. Where the fault is "half", a
    converter gets the sound network, `stretched`, a quantiser (which takes no half) one with capped variances, and any
    other tool a file that was halved."""
    path, to = folder / "exported.onnx", folder / "changed.onnx"
    if fault == "half":
        fault = "stretched" if "float16" in name else "capped" if "int8" in name else fault
    path.write_bytes(_exported(fault))
    with contextlib.redirect_stdout(None):
        TOOLS[name][1](path, to)
    return to


def _norms(net: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [each for each in net.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]


def _halved(path: Path) -> None:
    """Store every number in float16 behind a cast, and of the variances none above `CAP`, as a converter does."""
    model = onnx.load(str(path))
    for each in list(model.graph.initializer):
        if each.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(each).astype(np.float32)
            capped = np.minimum(array, CAP) if each.name.endswith("running_var") else array
            model.graph.node.insert(0, onnx.helper.make_node("Cast", [f"{each.name}_half"], [each.name], to=1))
            each.CopyFrom(numpy_helper.from_array(capped.astype(np.float16), f"{each.name}_half"))
    onnx.save(model, str(path))


def runner(path: Path) -> Any:
    """What runs a file as it is written, onnxruntime without its optimisations (which drop a live dropout), or
    torch."""
    if path.suffix == ".onnx":
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.export.load(path).module() if path.suffix == ".pt2" else torch.jit.load(path)
