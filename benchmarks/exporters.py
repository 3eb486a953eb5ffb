"""What each exporter makes of a model in training mode, and what it leaves of the model: the table of
docs/exporting.md, measured. Exporters that are not installed are left out and named.

    python benchmarks/exporters.py
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import other_torchvision  # noqa: F401  # before lightning

# isort: split
import lightning.pytorch as pl

from lightning_bn import check_export

BATCH = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 + 1
MODE = torch.onnx.TrainingMode


class Model(pl.LightningModule):
    """A frozen stem in eval mode, and a head in training mode with a dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).requires_grad_(False)
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.last = nn.Sequential(nn.Flatten(), nn.Linear(128, 4))
        for _ in range(30):
            self(torch.randn(16, 3, 8, 8) * 2 + 1)
        self.stem.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.head(self.stem(images)))  # type: ignore[no-any-return]


def parts(model: Model) -> nn.Sequential:
    """The model for what does not take a LightningModule without a Trainer."""
    return nn.Sequential(model.stem, model.head, model.last)


def session(path: Path) -> Any:
    """onnxruntime without its optimisations, which drop a live dropout."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnx(model: Model, folder: Path, **how: Any) -> Path:
    path = folder / "model.onnx"
    torch.onnx.export(model, (BATCH,), str(path), **{"dynamo": False, **how})
    return path


def optimised(name: str) -> Callable[[Model, Path], Any]:
    """An optimiser or a converter, run on the file of the older exporter with PRESERVE."""

    def export(model: Model, folder: Path) -> Any:
        import onnx as format_

        loaded = format_.load(str(onnx(model, folder, training=MODE.PRESERVE)))
        path = folder / "changed.onnx"
        format_.save(CHANGES[name](loaded), str(path))
        return session(path)

    return export


CHANGES: dict[str, Callable[[Any], Any]] = {
    "onnxslim": lambda model: importlib.import_module("onnxslim").slim(model),
    "onnxsim": lambda model: importlib.import_module("onnxsim").simplify(model)[0],
    "onnxoptimizer": lambda model: importlib.import_module("onnxoptimizer").optimize(model),
    "onnxconverter_common": lambda model: importlib.import_module(
        "onnxconverter_common.float16"
    ).convert_float_to_float16(model, keep_io_types=True),
    "onnxruntime.transformers": lambda model: importlib.import_module(
        "onnxruntime.transformers.float16"
    ).convert_float_to_float16(model, keep_io_types=True),
}


def lightning_onnx(model: Model, folder: Path, **how: Any) -> Any:
    model.to_onnx(folder / "model.onnx", BATCH, **how)
    return session(folder / "model.onnx")


def openvino(model: Model, folder: Path) -> Any:
    runtime = importlib.import_module("openvino")
    compiled = runtime.compile_model(runtime.convert_model(parts(model), example_input=BATCH), "CPU")
    return lambda batch: compiled(batch.numpy())[0]


def aot_inductor(model: Model, folder: Path) -> Any:
    """It takes a C++ compiler and a minute."""
    program = torch.export.export(model, (BATCH,))
    return torch._inductor.aoti_load_package(
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    )


EXPORTERS: dict[str, tuple[str, Callable[[Model, Path], Any]]] = {
    "torch.export": ("torch", lambda model, folder: torch.export.export(model, (BATCH,)).module()),
    "torch.jit.trace": ("torch", lambda model, folder: torch.jit.trace(parts(model), BATCH, check_trace=False)),
    "AOTInductor": ("torch", aot_inductor),
    "torch.onnx.export": ("onnx", lambda model, folder: session(onnx(model, folder, dynamo=True, verbose=False))),
    "torch.onnx.export(dynamo=False)": ("onnx", lambda model, folder: session(onnx(model, folder))),
    "the same, PRESERVE": ("onnx", lambda model, folder: session(onnx(model, folder, training=MODE.PRESERVE))),
    "the same, TRAINING": ("onnx", lambda model, folder: session(onnx(model, folder, training=MODE.TRAINING))),
    "PRESERVE, then onnxslim": ("onnxslim", optimised("onnxslim")),
    "PRESERVE, then onnxsim": ("onnxsim", optimised("onnxsim")),
    "PRESERVE, then onnxoptimizer": ("onnxoptimizer", optimised("onnxoptimizer")),
    "PRESERVE, then onnxconverter-common float16": ("onnxconverter-common", optimised("onnxconverter_common")),
    "PRESERVE, then onnxruntime.transformers float16": ("onnxruntime", optimised("onnxruntime.transformers")),
    "LightningModule.to_onnx": ("lightning", lightning_onnx),
    "LightningModule.to_onnx(dynamo=False)": ("lightning", lambda *given: lightning_onnx(*given, dynamo=False)),
    "LightningModule.to_torchscript": ("lightning", lambda model, folder: model.to_torchscript()),
    "LightningModule.to_torchscript(method='trace')": (
        "lightning",
        lambda model, folder: model.to_torchscript(method="trace", example_inputs=BATCH),
    ),
    "openvino.convert_model": ("openvino", openvino),
}


def row(export: Callable[[Model, Path], Any]) -> tuple[str, str]:
    """What the program does wrong, and what became of the model."""
    model = Model()
    reference = Model().eval()
    modes, state = [each.training for each in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        run = export(model, Path(folder))
        left = []
        if not all(torch.equal(value, state[key]) for key, value in model.state_dict().items()):
            left.append("statistics moved")
        if [each.training for each in model.modules()] != modes:
            left.append("frozen part thawed" if model.head.training else "all in eval mode")
        return ", ".join(each.code for each in check_export(run, reference, BATCH)) or "sound", ", ".join(
            left
        ) or "as it was"


def main() -> None:
    warnings.simplefilter("ignore")
    for name in ("torch.onnx", "lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    used, missing = {}, []
    print("| exporter | its answers | the model afterwards |\n|---|---|---|")
    for name, (package, export) in EXPORTERS.items():
        try:
            used[package] = version(package)
        except PackageNotFoundError:
            missing.append(package)
            continue
        try:
            made = row(export)
        except Exception as error:  # of an exporter that refuses
            made = f"refuses: {type(error).__name__}", ""
        print(f"| {name} | {made[0]} | {made[1]} |", flush=True)
    print("\n" + ", ".join(f"{package} {number}" for package, number in used.items()))
    if missing:
        print("not installed:", ", ".join(dict.fromkeys(missing)))


if __name__ == "__main__":
    main()
