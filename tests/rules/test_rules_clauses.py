"""Single clauses of the rules' conditions: each test fails where one of them is left out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from found import findings, of, only, serious
from small_models import Block, Module, Net
from torch import Tensor, nn

from lightning_bn import ModeCheck, check
from lightning_bn.discovery import find_batch_norms
from lightning_bn.rules.fit import EvaluatedLayers
from lightning_bn.rules.order import BatchOrder, Order

BACKBONE = ("model.backbone.0.1", "model.backbone.1.1")


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

    def test_head_without_batch_norm(self) -> None:
        """Its dropout is off all the same."""
        head = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 2))
        module = Module(nn.Sequential(Block(1, 4), nn.Flatten(), head))
        head.eval()
        assert only("BN102", findings(module)).layers == ("model.2",)


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


class TestBN107:
    def test_part_of_the_model(self) -> None:
        """The layers that the forward between batches ran are named, and no others."""

        class Features(Module):
            def on_train_batch_end(self, *args: Any) -> None:
                with torch.no_grad():
                    self.model.backbone(torch.randn(16, 1, 6, 6))

        assert only("BN107", findings(Features())).layers == BACKBONE


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


class TestBN205:
    def test_at_rest_in_eval_mode(self) -> None:
        """In eval mode such a layer uses its buffers in training too."""
        net = Net()
        net.head[2].track_running_stats = False
        assert only("BN205", check(net)).layers == ("head.2",)
        net.head[2].eval()
        assert of("BN205", check(net)) == []


def look(running: float, var: float) -> EvaluatedLayers:
    """What is kept of two channels of running variance 1 and `running`, whose input has the *unbiased* variances 1 and
    `var`."""
    layer = nn.BatchNorm1d(2).eval()
    layer.running_var[1] = running
    kept = EvaluatedLayers(find_batch_norms(nn.Sequential(layer)))
    one_one = torch.tensor([1.0, -1.0]).repeat(16)[:, None]  # of 32 values: 32 / 31
    layer(one_one * torch.tensor([1.0, var]).mul(31 / 32).sqrt())
    kept.close()
    return kept


class TestBN210:
    @pytest.mark.parametrize(("running", "times", "said"), [
        (9e-5, 110, True),
        (9e-5, 90, False),
        (1.1e-4, 110, False),
    ])  # fmt: skip
    def test_limits(self, running: float, times: float, said: bool) -> None:
        """A running variance below 10 eps, and an input that varies 100 times as much as it, eps included."""
        assert look(running, times * (running + 1e-5)).vanishing() == ({0: [1]} if said else {})


class TestBN301:
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_layer_without_running_statistics(self, momentum: float) -> None:
        """Its momentum is used by nothing."""
        net = Net()
        net.backbone[0][1] = nn.BatchNorm2d(4, momentum=momentum, track_running_stats=False)
        assert of("BN301", check(net)) == []
        net.backbone[1][1].momentum = momentum
        assert only("BN301", check(net)).layers == ("backbone.1.1",)


class TestBN304:
    def test_layers_in_eval_mode(self) -> None:
        """A layer that normalises with its running statistics needs no larger batch."""
        module = Module()
        module.model.backbone.requires_grad_(False).eval()
        assert only("BN304", findings(module, accumulate_grad_batches=3)).layers == ("model.head.2",)


def two_epochs(batches: list[Tensor]) -> Order | None:
    """Show `batches` in each of two epochs."""
    order = BatchOrder()
    for _ in range(2):
        order.begin_epoch()
        for batch in batches:
            see = order.begin_batch()
            assert see is not None
            see(batch)
    return order.found()


class TestBN307:
    @pytest.mark.parametrize(("spread", "likeness", "said"), [
        (5.0, 0.9, True),
        (1.0, 0.9, False),
        (5.0, 0.0, False),
        (5.0, 3.0 / 6, False),  # 37 batches: 6 is the root of 36
        (5.0, 3.2 / 6, True),
    ])  # fmt: skip
    def test_both_numbers_count(self, spread: float, likeness: float, said: bool) -> None:
        """Each of them is one in a thousand for shuffled data, where a normal variable is 3.09 deviations off."""
        assert Order(spread, likeness, 37, 16.0).is_sorted == said

    def test_what_is_no_image_or_vector(self) -> None:
        """Words, batches of one sample and inputs of one dimension are not judged; numbers and bytes are."""
        sorted_ = torch.arange(30.0)[:, None, None] + torch.randn(30, 8, 4)
        for batches, judged in (
            (sorted_, True),
            ((sorted_ + 10).mul(5).to(torch.uint8), True),
            (sorted_.long(), False),
            (sorted_[:, :1], False),
            (sorted_[:, :, 0], False),
        ):
            assert (two_epochs(list(batches)) is not None) == judged
