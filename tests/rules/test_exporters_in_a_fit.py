"""An exporter in the middle of a fit: what it does to modes is named as its doing, and the printed fix mends it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import trainer
from found import findings, only, serious
from lightning.pytorch import Callback
from small_data import data
from small_models import Module
from torch import Tensor

from lightning_bn import (
    ActivationStatsMonitor,
    CompareAverages,
    DriftMonitor,
    Finding,
    FreezeBatchNorm,
    ModeCheck,
    Window,
    exporting,
)

pytestmark = pytest.mark.usefixtures("in_a_folder")


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def to_onnx(module: Module, images: Tensor) -> None:
    module.to_onnx("model.onnx", images)


def to_onnx_older(module: Module, images: Tensor) -> None:
    module.to_onnx("model.onnx", images, dynamo=False)


def to_torchscript(module: Module, images: Tensor) -> None:
    module.to_torchscript(method="trace", example_inputs=images)


def leaves_eval(module: Module, images: Tensor) -> None:
    """As OpenVINO's ``convert_model`` does."""
    torch.jit.trace(module.eval(), images, check_trace=False)


def to_openvino(module: Module, images: Tensor) -> None:
    pytest.importorskip("openvino").convert_model(module, example_input=images)


def both(module: Module, images: Tensor) -> None:
    to_onnx_older(module, images)
    to_torchscript(module, images)


class Exports(Module):
    """Exports once, in a fit with a frozen backbone."""

    def __init__(self, export: Callable[[Module, Tensor], object], place: str, fix: str = "") -> None:
        super().__init__()
        self.model.backbone.requires_grad_(False).eval()
        self.export, self.place, self.fix = export, place, fix

    def at(self, place: str) -> None:
        if place == self.place:
            self.place = ""
            with warnings.catch_warnings(), self.mended():
                warnings.simplefilter("ignore")
                self.export(self, torch.randn(8, 1, 6, 6))

    def mended(self) -> AbstractContextManager[None]:
        """What the printed line makes."""
        line = self.fix.removeprefix("with ").removesuffix(":")
        return eval(line, {"exporting": exporting, "self": self}) if line else nullcontext()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 2:
            self.at("training_step")
        return self.loss(batch)

    def on_train_batch_end(self, *_: Any) -> None:
        self.at("on_train_batch_end")

    def on_train_epoch_end(self) -> None:
        self.at("on_train_epoch_end")


def found(*program: Any) -> list[Finding]:
    return findings(Exports(*program), max_epochs=2)


@pytest.mark.parametrize("place", ["training_step", "on_train_batch_end", "on_train_epoch_end"])
@pytest.mark.parametrize("export", [to_onnx, to_onnx_older, to_torchscript, both, leaves_eval, to_openvino])
def test_an_exporter_that_thaws_or_freezes_is_the_cause(export: Callable[[Module, Tensor], object], place: str) -> None:
    """BN103 names it with what it changed, nothing else is warned of, and with the printed line nothing is found."""
    said = found(export, place)
    finding = only("BN103", said)
    assert serious(said) == ["BN103"]
    assert "an exporter ran the model" in finding.seen
    freezes = export in (leaves_eval, to_openvino)
    assert f"training went from {freezes} to {not freezes}" in finding.seen
    assert finding.layers == (("",) if freezes else ("model.backbone",))
    assert serious(found(export, place, finding.fix.code)) == []


def test_an_exporter_that_changes_nothing_is_not_named() -> None:
    """``torch.export`` leaves modes as they are; a mode that somebody else changes later is not its doing."""

    def export_alone(module: Module, images: Tensor) -> None:
        torch.export.export(module.model, (images,))

    assert serious(found(export_alone, "on_train_batch_end")) == []

    class WakesLater(Exports):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.current_epoch == 1:
                self.model.train()
            return super().training_step(batch, batch_idx)

    finding = only("BN103", findings(WakesLater(export_alone, "on_train_batch_end"), max_epochs=2))
    assert "exporter" not in finding.seen


WATCHERS: dict[str, Callable[[], Callback]] = {
    "ModeCheck": lambda: ModeCheck(action="log"),
    "monitor": lambda: ActivationStatsMonitor(every_n_steps=1, verbose=False),
    "comparison": lambda: CompareAverages({"window": Window(3)}),
    "freezing": lambda: FreezeBatchNorm("model.head"),
    "drift": lambda: DriftMonitor(),
}


def script(module: Module, images: Tensor) -> object:
    return module.to_torchscript()


def script_a_part(module: Module, images: Tensor) -> object:
    return torch.jit.script(module.model)


def script_inside_of_another(module: Module, images: Tensor) -> object:
    return torch.jit.script(torch.nn.Sequential(module.model.eval(), torch.nn.Softmax(1)))


@pytest.mark.filterwarnings("ignore")  # a frozen part, and what some of them say of so short a fit
@pytest.mark.parametrize("watchers", [[each] for each in WATCHERS] + [list(WATCHERS)], ids=" ".join)
@pytest.mark.parametrize("export", [script, script_a_part, script_inside_of_another])
def test_a_watched_module_is_scripted(export: Callable[[Module, Tensor], Any], watchers: list[str]) -> None:
    """TorchScript compiles a module's hooks, of which those of callbacks are left out: the program answers as the
    module does, the callbacks go on, and nothing stays behind."""
    answers: list[bool] = []

    def exported(module: Module, images: Tensor) -> None:
        modes = [each.training for each in module.modules()]
        parts, hooks = list(module.modules()), [len(each._forward_hooks) for each in module.modules()]
        program = export(module, images)
        with torch.no_grad():
            expected = module.eval()(images)
            expected = expected.softmax(1) if export is script_inside_of_another else expected
            answers.append(torch.equal(program.eval()(images), expected))
        for each, mode in zip(module.modules(), modes, strict=True):
            each.training = mode
        assert list(module.modules()) == parts
        assert [len(each._forward_hooks) for each in module.modules()] == hooks

    module = Exports(exported, "training_step")
    trainer(*(WATCHERS[name]() for name in watchers), max_epochs=1).fit(module, data(), data(batches=2))
    assert answers == [True]
    assert not any("__prepare_scriptable__" in vars(each) for each in module.modules())


@pytest.mark.parametrize("place", ["training_step", "on_train_batch_end"])
def test_a_watched_module_is_scripted_inside_of_exporting(place: str) -> None:
    """There nothing is found of it, and without it the program works too."""

    def script(module: Module, images: Tensor) -> None:
        torch.jit.script(module.model)

    assert serious(found(script, place, "with exporting(self):")) == []
    assert serious(found(script, place)) == []
