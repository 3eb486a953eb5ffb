"""Each rule about statistics: the real mistake in a real run, and the nearest legitimate thing, of which nothing is
said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from found import findings, of, only, serious
from lightning.pytorch.callbacks import BaseFinetuning
from small_data import BATCHES
from small_models import Module, Net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bn import (
    Exponential,
    ModeCheck,
    StatisticsSets,
    check,
    convert_batch_norm,
    paused_statistics,
)

LAYERS = ("model.backbone.0.1", "model.backbone.1.1", "model.head.2")


class TestBN201:
    def test_frozen_in_train_mode(self) -> None:
        """requires_grad=False alone leaves the statistics moving; the fix names the part that is frozen as a whole."""
        module = Module()
        module.model.backbone.requires_grad_(False)
        finding = only("BN201", findings(module))
        assert finding.layers == LAYERS[:2]
        assert "self.model.backbone.eval()" in finding.message

    def test_frozen_in_eval_mode(self) -> None:
        """Frozen and in eval mode is frozen."""
        module = Module()
        module.model.backbone.requires_grad_(False).eval()
        assert serious(findings(module)) == []

    def test_partly_frozen_layer(self) -> None:
        """A layer of which the weight alone is held still learns."""
        module = Module()
        module.model.backbone[0][1].weight.requires_grad_(False)
        assert serious(findings(module)) == []

    def test_frozen_later(self) -> None:
        """A layer that is frozen in the second epoch is seen then, though its forwards look as before."""

        class FreezesLater(Module):
            def on_train_epoch_start(self) -> None:
                if self.current_epoch == 1:
                    self.model.backbone.requires_grad_(False)

        assert only("BN201", findings(FreezesLater(), max_epochs=2)).step == BATCHES


class Checkpointed(Net):
    """Recomputes its backbone in backward."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, images: Tensor) -> Tensor:
        # A reentrant checkpoint needs an input that requires grad.
        images = images.requires_grad_(torch.is_grad_enabled())
        return self.head(checkpoint(self.backbone, images, use_reentrant=self.reentrant))


class Shared(nn.Module):
    """One batch norm behind two convolutions."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.other = self.norm if shared else nn.BatchNorm2d(4)
        self.head = nn.Linear(16, 2)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.first(images)).relu()
        return self.head(self.other(self.second(features)).relu().flatten(1))


class Reused(Shared):
    """Registered once, called twice."""

    def __init__(self) -> None:
        super().__init__(shared=False)
        del self.other

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.first(images)).relu()
        return self.head(self.norm(self.second(features)).relu().flatten(1))


CUT_UP: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "samples": lambda features: features.chunk(4),
    "channels": lambda features: features.chunk(2, 1),
    "twice the whole": lambda features: [features[:], features[:]],
    "a half of each": lambda features: [features[:4, :2], features[4:, 2:]],
    "steps": lambda features: list(features[:3].permute(2, 0, 1).contiguous()),
}
"""How a norm may be given a tensor (batch, channels, positions), of which only the first is a batch in parts."""


class Ghost(Net):
    """One norm for all that features are cut into."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.cut, self.norm = CUT_UP[cut], nn.BatchNorm1d(2 if cut in ("channels", "a half of each") else 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        more = sum(self.norm(part).mean() for part in self.cut(features.flatten(2)))
        return self.head(features) + more


class ForwardsAgain(Module):
    """A metric of the training batch, by a second forward with the graph that nobody needs."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())
        return loss


class TwoViews(Module):
    """Each batch in two views, as in contrastive learning."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels) + F.cross_entropy(self(images.flip(-1)), labels)


class PausedAgain(Module):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        with paused_statistics(self.model):
            self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())
        return loss


class TestBN202:
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing(self, reentrant: bool) -> None:
        """torch's layers count a recomputed batch twice, and the recomputation is told from the first pass."""
        finding = only("BN202", findings(Module(Checkpointed(reentrant=reentrant))))
        assert finding.layers == LAYERS[:2]
        assert "checkpointing" in finding.message
        assert "convert_batch_norm" in finding.message

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing_with_own_layers(self, reentrant: bool) -> None:
        """This package's layers don't, and nothing is said."""
        module = Module(convert_batch_norm(Checkpointed(reentrant=reentrant)))
        assert serious(findings(module)) == []

    def test_registered_twice(self) -> None:
        """A layer under two names is told as shared, with both."""
        finding = only("BN202", findings(Module(Shared(shared=True))))
        assert "shared layer, registered as model.norm and model.other" in finding.message

    def test_called_twice(self) -> None:
        """A layer that one forward of the model calls twice is told as shared too."""
        assert "shared layer was called 2 times" in only("BN202", findings(Module(Reused()))).message

    def test_a_batch_cut_up(self) -> None:
        """A ghost batch norm is one place by design: information, with no layer for each part."""
        finding = only("BN202", findings(Module(Ghost("samples"))))
        assert (finding.level, finding.layers) == ("info", ("model.norm",))
        assert "given its batch in 4 parts" in finding.seen

    @pytest.mark.parametrize("cut", list(CUT_UP)[1:])
    def test_other_parts_are_places(self, cut: str) -> None:
        """Halves of the channels, also of other samples, the whole batch again and steps of a sequence are places."""
        finding = only("BN202", findings(Module(Ghost(cut))))
        assert finding.level == "warning"
        assert "shared layer was called" in finding.seen

    def test_a_layer_for_each_place(self) -> None:
        """Two layers in two places are fine."""
        assert serious(findings(Module(Shared(shared=False)))) == []

    def test_extra_forward_of_the_same_batch(self) -> None:
        """A second forward of the same tensor is an extra forward, and counts the batch twice."""
        finding = only("BN202", findings(ForwardsAgain()))
        assert finding.level == "warning"
        assert "extra forward of the same input" in finding.message

    def test_two_forwards_that_the_loss_depends_on(self) -> None:
        """One tensor twice, as in R-Drop, is information, if the loss depends on both; also where later batches run
        otherwise."""

        class Both(Module):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                if batch_idx == 3:
                    self.model.eval()
                    self.model(batch[0])
                    self.model.train()
                return self.loss(batch) + self.loss(batch)

        found = of("BN202", findings(Both()))
        assert {finding.level for finding in found} == {"info"}
        assert "of the same input moved them, and the loss depends on each" in found[0].seen

    def test_two_views(self) -> None:
        """Two inputs are two batches: information."""
        assert only("BN202", findings(TwoViews())).level == "info"

    def test_paused_extra_forward(self) -> None:
        """With the statistics paused the second forward moves nothing."""
        assert serious(findings(PausedAgain())) == []


class TestBN203:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_batch_that_is_not_finite(self, value: float) -> None:
        """The layer, its channels and the steps between which it happened are told."""

        class Poisoned(Module):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                if batch_idx == 3:
                    with torch.no_grad():
                        self.model.head[2](
                            torch.full((4, 8), value).index_fill(1, torch.tensor([0, 1, 2, 3, 4, 7]), 1.0)
                        )
                return self.loss(batch)

        finding = only("BN203", findings(Poisoned(), check=ModeCheck(action="log", every_n_steps=1)))
        assert (finding.level, finding.layers, finding.step) == ("error", ("model.head.2",), 3)
        assert "channels 5, 6" in finding.message
        assert "sound at step 2" in finding.message

    def test_a_set_that_is_not_in_place(self) -> None:
        """A set of statistics that is used in the steps is looked at between them too, and named."""

        class Sets(Module):
            def __init__(self) -> None:
                super().__init__()
                self.sets = StatisticsSets(self.model, ["day", "night"])

            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                if batch_idx == 3:
                    with torch.no_grad(), self.sets.use("night"):
                        self.model.head[2](torch.full((4, 8), float("nan")))
                return self.loss(batch)

        finding = only("BN203", findings(Sets(), check=ModeCheck(action="log", every_n_steps=1)))
        assert (finding.level, finding.layers, finding.step) == ("error", ("model.head.2@night",), 3)
        assert "inside of sets.use('night')" in finding.message

    def test_negative_variance(self) -> None:
        """A negative variance, as averaging of weights with a negative coefficient leaves, is found at rest."""
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
        model[1].running_var[1] = -0.5
        assert "channel 1" in only("BN203", check(model)).message

    def test_own_layers_skip_it(self) -> None:
        """This package's layers leave such a batch out, and nothing is said."""

        class Poisoned(Module):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                if batch_idx == 3:
                    with torch.no_grad(), paused_statistics(self.model.backbone):
                        self.model.head[2](torch.full((4, 8), float("nan")))
                return self.loss(batch)

        assert of("BN203", findings(Poisoned(convert_batch_norm(Net())))) == []


class TestBN204:
    def test_branch_that_training_leaves_out(self) -> None:
        """A layer that only evaluation runs through normalises with mean 0 and variance 1."""

        class Branches(Module):
            def __init__(self) -> None:
                super().__init__()
                self.eval_head = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16))

            def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
                self.eval_head(self.model.backbone(batch[0]))

        early, late = of("BN204", findings(Branches()))
        assert (early.level, early.layers, early.stage) == (
            "info",
            ("eval_head.1",),
            "validate",
        )  # its turn may come in a later epoch
        assert (late.level, late.layers, late.stage) == ("error", ("eval_head.1",), "train")

    def test_sanity_check(self) -> None:
        """Before training began every layer is at its start, and the sanity check is no mistake."""
        assert of("BN204", findings(Module(), max_epochs=0)) == []
        assert of("BN204", findings(Module())) == []

    def test_loaded_statistics(self) -> None:
        """Statistics that were loaded without a count of batches are statistics."""
        module = Module()
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.fill_(0.1)
        module.model.backbone.eval().requires_grad_(False)
        assert serious(findings(module)) == []

    def test_frozen_from_the_start(self) -> None:
        """A frozen layer that is in eval mode in training too is a constant."""
        module = Module()
        module.model.backbone.eval().requires_grad_(False)
        assert serious(findings(module)) == []


class Freeze(BaseFinetuning):
    """Lightning's own way to freeze a backbone."""

    def __init__(self, *, train_bn: bool) -> None:
        super().__init__()
        self.train_bn = train_bn

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.model.backbone, train_bn=self.train_bn)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.backbone, optimizer, train_bn=self.train_bn)


class TestBN205:
    def test_what_base_finetuning_leaves(self) -> None:
        """`freeze(train_bn=False)` leaves layers that train on batch statistics and evaluate with stale ones."""
        finding = only("BN205", findings(Module(), Freeze(train_bn=False)))
        assert finding.layers == LAYERS[:2]

    def test_frozen_and_in_eval(self) -> None:
        """Likewise frozen, but in eval mode, it normalises with the same statistics in both."""
        module = Module()
        module.model.backbone.eval()
        assert serious(findings(module, Freeze(train_bn=False))) == []

    def test_train_bn(self) -> None:
        """`train_bn=True` keeps the layers learning."""
        assert serious(findings(Module(), Freeze(train_bn=True), max_epochs=2)) == []

    def test_no_buffers(self) -> None:
        """A layer built without running statistics uses the batch's in eval too, as it was told to."""
        model = Net()
        model.backbone[0][1] = nn.BatchNorm2d(4, track_running_stats=False)
        assert serious(findings(Module(model))) == []


class TestBN206:
    @pytest.mark.parametrize(("dtype", "momentum", "stuck"), [
        (torch.bfloat16, 0.01, True),
        (torch.bfloat16, 0.1, False),
        (torch.float16, 0.001, True),
        (torch.float16, 0.01, False),
        (torch.float32, 0.001, False),
    ])  # fmt: skip
    def test_dtype_and_momentum(self, dtype: torch.dtype, momentum: float, stuck: bool) -> None:
        """The rule speaks where torch's layer really stops more than 5 % short of the mean of its batches, and there
        alone."""
        model = nn.Sequential(nn.BatchNorm1d(1, momentum=momentum)).to(dtype)
        said = bool(of("BN206", check(model)))
        batch = torch.tensor([[4.0], [6.0]], dtype=dtype)
        for _ in range(int(5 / momentum)):
            model(batch)
        assert (abs(model[0].running_mean.item() / 5 - 1) > 0.05) == stuck
        assert said == stuck

    def test_in_a_run(self) -> None:
        """In true half precision with a small momentum it is said before the first batch."""
        model = Net()
        for layer in (model.backbone[0][1], model.backbone[1][1], model.head[2]):
            layer.momentum = 0.01
        assert only("BN206", findings(Module(model), precision="bf16-true")).layers == LAYERS

    def test_fix_reaches_the_statistics_of_the_batches(self) -> None:
        """With the printed fix the mean and variance are those of equal batches after ten of them already, and not on
        their way from 0 and 1."""
        model = nn.Sequential(nn.BatchNorm1d(1, momentum=0.01)).to(torch.bfloat16)
        (finding,) = check(model)
        names = {"model": model, "convert_batch_norm": convert_batch_norm, "Exponential": Exponential}
        exec(finding.fix.code, names)
        for _ in range(10):
            model(torch.tensor([[4.0], [6.0]], dtype=torch.bfloat16))
        torch.testing.assert_close((model[0].running_mean.item(), model[0].running_var.item()), (5.0, 2.0))

    def test_mixed_precision(self) -> None:
        """Mixed precision keeps the statistics in float32."""
        model = Net()
        model.backbone[0][1].momentum = 0.01
        assert of("BN206", findings(Module(model), precision="bf16-mixed")) == []
