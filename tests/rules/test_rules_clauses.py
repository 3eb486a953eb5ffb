"""Single clauses of the rules' conditions: each test fails where one of them is left out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from found import findings, of, serious
from small_models import Module, Net
from torch import Tensor, nn

from lightning_bn import Finding, ModeCheck, check

BACKBONE = ("model.backbone.0.1", "model.backbone.1.1")


def only(code: str, found: list[Finding]) -> Finding:
    """Return the one finding of `code`."""
    (finding,) = of(code, found)
    return finding


class HeadAlone(Module):
    """The optimizer gets the head alone."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.head.parameters(), lr=0.01)


class Strays(Module):
    """A frozen backbone in eval mode, but for a forward under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.model.backbone.requires_grad_(False).eval()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.model.backbone.train()(batch[0])
            self.model.backbone.eval()
        return self.loss(batch)


class DetachedTeacher(Module):
    """A mean teacher in train mode, with gradients on, whose weights are written past autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), self.teacher(batch[0]).detach().softmax(1))

    def on_before_zero_grad(self, optimizer: Any) -> None:
        for mine, other in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            mine.data.lerp_(other.data, 0.1)


class EvaluatesInTrainMode(Module):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.train()
        self(batch[0])


class TestBN101:
    def test_one_finding(self) -> None:
        """A module in eval mode as a whole is one mistake, and no mistake where all of it may stay in eval mode."""
        module = Module()
        module.eval()
        assert serious(findings(module)) == ["BN101"]
        module.eval()
        assert serious(findings(module, check=ModeCheck(action="log", allow_eval=["*"]))) == []

    def test_put_into_eval_mode_at_the_end_of_the_step(self) -> None:
        """The change is the mistake; what follows from it in the same batch and in later ones is not told again."""

        class Forgets(Module):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                loss = self.loss(batch)
                self.eval()
                return loss

        assert serious(findings(Forgets())) == ["BN103"]


class TestBN102:
    def test_eval_mode_for_the_first_forward_of_a_step(self) -> None:
        """Targets from the network itself, in eval mode, before it trains on them."""

        class LabelsItself(Module):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                self.model.eval()
                with torch.no_grad():
                    target = self(batch[0]).softmax(1)
                self.model.train()
                return F.cross_entropy(self(batch[0]), target)

        assert serious(findings(LabelsItself())) == []


class TestBN103:
    def test_allowed(self) -> None:
        """What may be in eval mode may be put into it in the step."""

        class Freezes(Module):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                self.model.backbone.eval()
                return self.loss(batch)

        said = findings(Freezes()), findings(Freezes(), check=ModeCheck(action="log", allow_eval=["model.backbone"]))
        assert [serious(each) for each in said] == [["BN103"], []]


class TestBN104:
    def test_one_finding(self) -> None:
        """A forward in train mode in an evaluation is no stray forward of the training too."""
        assert serious(findings(EvaluatesInTrainMode())) == ["BN104"]


class TestBN201:
    def test_forward_under_no_grad(self) -> None:
        """What moves a frozen layer under no_grad is a stray forward: eval mode, the fix of this rule, is on."""
        found = findings(Strays())
        assert of("BN201", found) == []
        assert only("BN106", found).level == "warning"

    def test_teacher_with_gradients_on(self) -> None:
        """An averaged teacher is no frozen layer: neither before the first epoch has shown that its weights are
        written, nor after."""
        for epochs in (1, 2):
            assert of("BN201", findings(DetachedTeacher(), max_epochs=epochs)) == []

    def test_cause(self) -> None:
        """The message says which of the two ways of freezing it saw."""
        frozen = Module()
        frozen.model.backbone.requires_grad_(False)
        assert only("BN201", findings(frozen)).seen.endswith("no parameter of the layer requires grad.")
        assert only("BN201", findings(HeadAlone())).seen.endswith("no optimizer holds a parameter of the layer.")

    def test_at_rest(self) -> None:
        """`check` says nothing of a frozen layer in eval mode, nor of one without running statistics."""
        net = Net()
        net.backbone.requires_grad_(False)
        assert only("BN201", check(net)).layers == ("backbone.0.1", "backbone.1.1")
        net.backbone[0][1] = nn.BatchNorm2d(4, track_running_stats=False).requires_grad_(False)
        assert only("BN201", check(net)).layers == ("backbone.1.1",)
        net.backbone.eval()
        assert of("BN201", check(net)) == []


class TestBN202:
    def test_extra_forward_under_no_grad(self) -> None:
        """A second forward of the same input under no_grad is one mistake, of another rule."""

        class Metric(Module):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                with torch.no_grad():
                    self(batch[0])
                return self.loss(batch)

        assert serious(findings(Metric())) == ["BN106"]

    def test_two_forwards_in_validation(self) -> None:
        """Two forwards in train mode in an evaluation, even one with gradients, are told by the rule about evaluations
        alone."""

        class Twice(Module):
            def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
                self.train()
                with torch.enable_grad():
                    self(batch[0])
                    self(batch[0])

        assert "BN202" not in serious(findings(Twice()))


class TestBN204:
    def test_said_at_once_of_what_training_runs(self) -> None:
        """A layer that training runs in eval mode will have no turn: an error at the first validation already."""
        module = Module()
        module.model.backbone.eval()
        finding = only("BN204", findings(module, check=ModeCheck(action="log", ignore=["BN102"])))
        assert (finding.level, finding.layers, finding.stage) == ("error", BACKBONE, "validate")

    @pytest.mark.parametrize(("make", "allow"), [(HeadAlone, []), (Module, ["model.backbone"])])
    def test_constant_on_purpose(self, make: type[Module], allow: list[str]) -> None:
        """In eval mode from the start, what no optimizer holds is a constant, and so is what may stay in eval mode."""
        module = make()
        module.model.backbone.eval()
        assert serious(findings(module, check=ModeCheck(action="log", allow_eval=allow))) == []

    def test_trained_at_rest(self) -> None:
        """Of a model that was trained `check` says nothing."""
        module = Module()
        findings(module)
        assert of("BN204", check(module)) == []
