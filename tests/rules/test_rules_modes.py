"""Each rule about modes: the real mistake in a real run, and the nearest legitimate thing, of which nothing is said."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fitting import quiet, trainer
from found import findings, of, only, serious
from small_data import data
from small_models import Module
from torch import Tensor

from lightning_bn import ModeCheck, ModeCheckError


class TestBN101:
    def test_eval_before_fit(self) -> None:
        """A module in eval mode during training steps is an error that names the module itself, at the first batch."""
        module = Module()
        module.eval()
        finding = only("BN101", findings(module))
        assert (finding.level, finding.layers, finding.stage, finding.step) == ("error", ("",), "train", 0)

    def test_eval_then_train(self) -> None:
        """A module that was in eval mode before, and was put back, is fine."""
        module = Module()
        module.eval().train()
        assert serious(findings(module)) == []

    def test_says_it_once(self) -> None:
        """Fifty submodules in eval mode with the module have one cause, and so has a validation with statistics that
        nothing moved."""
        module = Module()
        module.eval()
        found = findings(module)
        assert serious(found) == ["BN101"]
        finding = only("BN204", found)
        assert (finding.level, finding.follows) == ("info", "BN101")
        assert "follows from BN101" in finding.message


class TestBN102:
    def test_pretrained_part_in_eval(self) -> None:
        """A part with trainable parameters in eval mode, as pretrained models load, is named with the call that mends
        it."""
        module = Module()
        module.model.backbone.eval()
        finding = only("BN102", findings(module))
        assert (finding.level, finding.layers) == ("warning", ("model.backbone",))
        assert "self.model.backbone.train()" in finding.message

    def test_allowed(self) -> None:
        """What `allow_eval` names, itself or by a pattern, may be in eval mode."""
        for pattern in ("model.backbone", "model.b*", "*.backbone"):
            module = Module()
            module.model.backbone.eval()
            assert of("BN102", findings(module, check=ModeCheck(action="log", allow_eval=[pattern]))) == []

    def test_frozen_part_in_eval(self) -> None:
        """A part without trainable parameters belongs in eval mode."""
        module = Module()
        module.model.backbone.eval().requires_grad_(False)
        assert of("BN102", findings(module)) == []

    def test_only_what_is_in_eval_with_its_parameters(self) -> None:
        """A container in eval mode whose trainable part is in train mode is not named, nor is its frozen rest."""
        module = Module()
        module.model.eval()
        module.model.backbone.requires_grad_(False)
        module.model.head.train()
        assert of("BN102", findings(module)) == []


class EvalInStep(Module):
    """Puts the model in eval mode for a metric in the fourth batch, and forgets to put it back."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if batch_idx == 3:
            self.model.eval()
            self(batch[0])
        return loss


class EvalAndBack(Module):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.model.eval()
        self(batch[0])
        self.model.train()
        return loss


class EvalBeforeBatch(Module):
    """Freezes by mode in the hook that is there for it."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.model.backbone.eval()


class EvalAtHeadOfStep(Module):
    """Freezes by mode at the head of the step, a usual idiom."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.model.backbone.eval()
        return self.loss(batch)


class TrainInStep(Module):
    """Undoes a freeze."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.model.train()
        return self.loss(batch)


class TestBN103:
    def test_changed_and_left(self) -> None:
        """The modules and the batch are named; what follows from it in later batches is not told again."""
        found = findings(EvalInStep())
        finding = only("BN103", found)
        assert finding.layers == ("model",)
        assert finding.step == 3
        assert "in batch 3 training went from True to False" in finding.message
        assert of("BN102", found) == []

    def test_changed_and_put_back(self) -> None:
        """A mode that is put back within the step is nobody's business."""
        assert serious(findings(EvalAndBack())) == []

    def test_changed_before_the_batch(self) -> None:
        """What the module's own hook does before the step is not the step's doing."""
        module = EvalBeforeBatch()
        module.model.backbone.requires_grad_(False)
        assert of("BN103", findings(module)) == []

    def test_frozen_part_put_in_eval(self) -> None:
        """To put a frozen part in eval mode at the head of the step is to freeze it."""
        module = EvalAtHeadOfStep()
        module.model.backbone.requires_grad_(False)
        assert of("BN103", findings(module)) == []

    def test_freeze_undone(self) -> None:
        """The other way round it is a mistake: .train() at the head of the step wakes a frozen part."""
        module = TrainInStep()
        module.model.backbone.requires_grad_(False).eval()
        assert only("BN103", findings(module)).layers == ("model.backbone",)


class TrainInValidation(Module):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.train()
        self.loss(batch)

    test_step = predict_step = validation_step  # type: ignore[assignment]


class TrainDropoutInPredict(Module):
    """Monte Carlo dropout: only the dropout in train mode."""

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        for part in self.modules():
            if isinstance(part, torch.nn.Dropout):
                part.train()
        return self(batch[0])


class TestBN104:
    def test_validation(self) -> None:
        """`self.train()` in a validation step writes into the statistics: an error, at the first such batch."""
        finding = only("BN104", findings(TrainInValidation()))
        assert finding.level == "error"
        assert finding.stage == "sanity_check"
        assert finding.layers == ("model.backbone.0.1", "model.backbone.1.1", "model.head.2")

    @pytest.mark.parametrize("stage", ["validate", "test", "predict"])
    def test_alone(self, stage: str) -> None:
        """Likewise in validate, test and predict by themselves, without a fit."""
        check = ModeCheck(action="log")
        with quiet():
            getattr(trainer(check), stage)(TrainInValidation(), data(batches=2))
        assert only("BN104", check.findings).stage == stage

    def test_dropout_alone_in_train_mode(self) -> None:
        """Monte Carlo dropout leaves batch norm in eval mode, and nothing is said."""
        check = ModeCheck(action="log")
        with quiet():
            trainer(check).predict(TrainDropoutInPredict(), data(batches=2))
        assert {finding.code for finding in check.findings} <= {"BN208"}  # an untrained network


class RestoresNothing(Module):
    def on_validation_model_train(self) -> None:
        pass


class RestoresByHand(Module):
    def on_validation_model_train(self) -> None:
        self.train()
        self.model.backbone.eval()


class RaisesInValidation(Module):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.trainer.current_epoch == 0 and not self.trainer.sanity_checking and self.raises:
            raise RuntimeError("the disk is full")

    raises = True


class TestBN105:
    def test_overridden_hook(self) -> None:
        """A hook that puts nothing back is found after the first validation that it leaves in eval mode."""
        finding = only("BN105", findings(RestoresNothing(), num_sanity_val_steps=0, max_epochs=2))
        assert finding.layers == ("",)
        assert "on_validation_model_train" in finding.message

    def test_after_the_sanity_check(self) -> None:
        """The sanity check is a validation too."""
        assert only("BN105", findings(RestoresNothing())).step == 0

    def test_hook_that_restores_by_hand(self) -> None:
        """An overridden hook that leaves every module as it was is fine."""
        module = RestoresByHand()
        module.model.backbone.eval().requires_grad_(False)
        assert serious(findings(module)) == []

    def test_exception_then_another_fit(self) -> None:
        """After an exception in validation the next fit begins in eval mode, and the cause is told with it."""
        module, check = RaisesInValidation(), ModeCheck(action="log")
        with pytest.raises(RuntimeError, match="disk"):
            findings(module, check=check)
        assert serious(check.findings) == []
        module.raises = False
        found = findings(module, check=check)
        assert "exception" in only("BN105", found).message
        assert of("BN101", found) == []

    def test_exception_then_train(self) -> None:
        """Who puts the module back in train mode by hand hears nothing."""
        module, check = RaisesInValidation(), ModeCheck(action="log")
        with pytest.raises(RuntimeError, match="disk"):
            findings(module, check=check)
        module.raises = False
        module.train()
        assert serious(findings(module, check=check)) == []


class Teacher(Module):
    """A teacher that nobody put in eval mode."""

    def __init__(self, *, in_eval: bool = False) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.model).train(not in_eval).requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = self.teacher(batch[0]).softmax(1)
        return torch.nn.functional.cross_entropy(self(batch[0]), target)


class SharpnessAware(Module):
    """SAM: a second forward and backward of the same batch at weights that training only passes through."""

    def __init__(self, *, pause: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.pause = pause

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        from contextlib import nullcontext

        from lightning_bn import paused_statistics

        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        before = [parameter.detach().clone() for parameter in self.parameters()]
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(parameter.grad, alpha=0.05)
        optimizer.zero_grad()
        with paused_statistics(self.model) if self.pause else nullcontext():
            self.manual_backward(self.loss(batch))
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), before, strict=True):
                parameter.copy_(value)
        optimizer.step()
        optimizer.zero_grad()


class TestBN106:
    def test_teacher_in_train_mode(self) -> None:
        """A teacher's forward under no_grad in train mode moves its statistics."""
        found = findings(Teacher())
        finding = only("BN106", found)
        assert of("BN201", found) == []  # one cause, one message, frozen or not
        assert finding.layers == ("teacher.backbone.0.1", "teacher.backbone.1.1", "teacher.head.2")
        assert "self.teacher.eval()" in finding.message

    def test_teacher_in_eval_mode(self) -> None:
        """A teacher in eval mode is as it should be."""
        assert serious(findings(Teacher(in_eval=True))) == []

    def test_second_forward_of_sam(self) -> None:
        """The second forward of sharpness-aware minimisation counts the batch at weights that are never evaluated."""
        found = findings(SharpnessAware())
        assert "SAM" in only("BN106", found).message
        assert of("BN202", found) == []  # one cause, one message

    def test_second_forward_with_paused_statistics(self) -> None:
        """With this package's pause around it nothing is said."""
        assert serious(findings(SharpnessAware(pause=True))) == []


def test_raises_at_the_first_mistake() -> None:
    """With action "raise" the run ends in the batch of the mistake, and the error carries the findings."""
    module = Module()
    module.eval()
    with pytest.raises(ModeCheckError) as error:
        findings(module, check=ModeCheck(action="raise"))
    assert [finding.code for finding in error.value.findings] == ["BN101"]
    assert module.global_step == 1


def test_validate_between_two_fits() -> None:
    """A validation by itself between two fits is not held against modes that the user changed since the first."""
    check, module = ModeCheck(action="log"), Module()
    findings(module, check=check, limit_val_batches=0)  # with a validation at its end, there is nothing left to hold
    module.model.backbone.eval().requires_grad_(False)
    with quiet():
        trainer(check).validate(module, data(batches=2), verbose=False)
    assert serious(findings(module, check=check)) == []
