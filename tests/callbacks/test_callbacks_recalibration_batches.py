"""How a batch goes in: forward where it fits, else training_step, and none of it leaves a trace."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from fitting import fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from small_data import loader, training_data
from small_models import Small
from states import matches_weights, parameters_equal
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_bn import BatchNormRecalibration

Pair = namedtuple("Pair", ["inputs", "labels"])


@dataclass
class Item:
    inputs: Tensor
    labels: Tensor


class Shaped(Dataset[Any]):
    """The training data, each item put into a form by `shape`."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return len(training_data())

    def __getitem__(self, index: int) -> Any:
        return self.shape(*training_data()[index])


def collate_items(items: list[Item]) -> Item:
    return Item(torch.stack([item.inputs for item in items]), torch.stack([item.labels for item in items]))


class Recording(Small):
    """Small, whose training_step takes any of the forms, and which knows how it was called in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.ways: set[str] = set()
        self.inside = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.training:
            WAYS.add("training_step")
        inputs, labels = batch
        return F.cross_entropy(self.rest(self.bn1(self.first(inputs))), labels)


WAYS: set[str] = set()


@pytest.fixture(autouse=True)
def _no_ways() -> None:
    WAYS.clear()


class Keywords(Recording):
    def forward(self, inputs: Tensor) -> Tensor:
        WAYS.add("forward")
        return super().forward(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["inputs"], batch["labels"]), batch_idx)


class HuggingFaceLike(Keywords):
    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        return {"loss": F.cross_entropy(super().forward(inputs), labels)}


class WholeMapping(Keywords):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return super().forward(batch["inputs"])


class Both(Recording):
    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        WAYS.add("forward")
        return F.cross_entropy(Small.forward(self, inputs), labels)


class First(Recording):
    def forward(self, inputs: Tensor) -> Tensor:
        WAYS.add("forward")
        return super().forward(inputs)


class OfItem(Recording):
    def forward(self, item: Item) -> Tensor:
        WAYS.add("forward")
        return super().forward(item.inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch.inputs, batch.labels), batch_idx)


class Plain(Recording):
    def forward(self, inputs: Tensor) -> Tensor:
        WAYS.add("forward")
        return super().forward(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch, (batch[:, 1] > batch[:, 3]).long()), batch_idx)


class NoForward(Recording):
    forward = pl.LightningModule.forward


class NoIndex(NoForward):
    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


class Useless(Recording):
    """Its forward takes one argument, and can do nothing with a batch's first part."""

    def forward(self, inputs: Any) -> Tensor:
        return Small.forward(self, inputs["image"])


def dicts(inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"inputs": inputs, "labels": labels}


@pytest.mark.parametrize(
    ("module", "shape", "way"),
    [
        (First, lambda inputs, labels: (inputs, labels), "forward"),
        (First, lambda inputs, labels: [inputs, labels], "forward"),
        (First, Pair, "forward"),
        (Both, lambda inputs, labels: (inputs, labels), "forward"),
        (Plain, lambda inputs, labels: inputs, "forward"),
        (Keywords, dicts, "forward"),
        (HuggingFaceLike, dicts, "forward"),
        (WholeMapping, dicts, "forward"),
        (NoForward, lambda inputs, labels: (inputs, labels), "training_step"),
        (NoIndex, lambda inputs, labels: (inputs, labels), "training_step"),
        (Useless, lambda inputs, labels: (inputs, labels), "training_step"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_way_in(module: type[Recording], shape: Any, way: str) -> None:
    """Each form of batch goes in as the table in the docs says, and the statistics match the weights."""
    trained, _ = fit(BatchNormRecalibration(), module=module(), train=DataLoader(Shaped(shape), 8), val=None)
    assert {way} == WAYS
    assert matches_weights(trained.state_dict())


def test_an_object_that_is_no_container() -> None:
    """A dataclass, or a graph library's batch, goes into forward as it is."""
    data = DataLoader(Shaped(Item), 8, collate_fn=collate_items)
    trained, _ = fit(BatchNormRecalibration(), module=OfItem(), train=data, val=None)
    assert {"forward"} == WAYS
    assert matches_weights(trained.state_dict())


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size"])
def test_several_loaders(mode: str) -> None:
    """A CombinedLoader's batches go through training_step, in the mode in which the fit combines them."""
    sizes = []

    class Two(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if not self.training:
                sizes.append([len(part[0]) for part in batch.values()])
            return sum(super(Two, self).training_step(part, batch_idx) for part in batch.values())

    loaders = {"a": DataLoader(training_data(), 8), "b": DataLoader(training_data(), 24)}
    callback = BatchNormRecalibration()
    fit(callback, module=Two(), train=CombinedLoader(loaders, mode), val=None)
    # The first is the trial, on the first training batch.
    assert sizes[1:] == [[8, 24]] * (6 if mode == "max_size_cycle" else 2)
    assert callback.report.layers[0].samples == len(sizes[1:]) * 32


def test_forward_is_taken_as_given() -> None:
    """forward= is the only way that is tried."""
    seen = []

    def forward(module: pl.LightningModule, batch: Any) -> None:
        seen.append(batch[0].device)
        module(batch[0])

    fit(BatchNormRecalibration(forward=forward), module=First(), val=None)
    assert len(seen) == 6


def test_the_error_of_a_training_step_says_that_it_ran_in_eval_mode() -> None:
    """Which is how a recalibration runs it, and what a step may not be made for."""

    class InTrainingOnly(Small):
        def forward(self, inputs: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
            return super().forward(inputs)

        def loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(*batch, None), batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if not self.training:
                raise RuntimeError("no targets")
            return super().training_step(batch, batch_idx)

    told = r"training_step\(.*\) in eval mode raised RuntimeError: no targets.*forward=lambda module, batch"
    with pytest.raises(MisconfigurationException, match=told):
        fit(BatchNormRecalibration(), module=InTrainingOnly(), val=None)


class Chatty(NoForward):
    """A training_step that logs, counts, gathers, updates metrics and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(2)
        self.group = torchmetrics.MetricCollection(
            [torchmetrics.classification.MulticlassPrecision(2), torchmetrics.classification.MulticlassRecall(2)]
        )
        self.curve = torchmetrics.CatMetric()
        self.outputs: list[float] = []
        self.by_name: dict[str, int] = {"steps": 0}
        self.steps = 0
        self.register_buffer("moving", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        logits = self.rest(self.bn1(self.first(inputs)))
        self.accuracy(logits, labels)
        self.group(logits, labels)
        self.curve.update(logits.detach().max())
        self.log("train_acc", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"steps": float(self.steps)}, on_step=True)
        self.logger.experiment.add_scalar("direct", self.steps)
        self.outputs.append(float(torch.rand(())))
        self.by_name["steps"] += 1
        self.steps += 1
        self.moving += 1
        return F.cross_entropy(logits, labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.rest(self.bn1(self.first(batch[0]))), batch[1]))


@pytest.mark.parametrize("when", ["fit_end", "validation"])
def test_a_training_step_leaves_no_trace(when: str, tmp_path: Any) -> None:
    """Its logging is muted; torchmetrics, buffers, counters, lists and random numbers of the module are as without the
    callback."""
    logs = []
    modules = []
    for callbacks in ([], [BatchNormRecalibration(when=when)]):
        torch.manual_seed(0)
        module = Chatty()
        logger = pl.loggers.TensorBoardLogger(tmp_path, name="", version=str(len(callbacks)))
        _, runner = fit(*callbacks, module=module, logger=logger, log_every_n_steps=1)
        modules.append(module)
        logs.append({name: value for name, value in runner.logged_metrics.items() if "val" not in name})
    one, two = modules
    assert logs[0] == logs[1]
    assert parameters_equal(one, two)
    assert (one.outputs, one.by_name, one.steps) == (two.outputs, two.by_name, two.steps)
    assert torch.equal(one.moving, two.moving)
    for name in ("accuracy", "curve"):
        assert str(getattr(one, name).metric_state) == str(getattr(two, name).metric_state)
        assert getattr(one, name).update_count == getattr(two, name).update_count
    assert str(one.group.compute()) == str(two.group.compute())
    assert [type(module) for module in one.modules()] == [type(module) for module in two.modules()]
    assert set(vars(one)) == set(vars(two))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = []
    for version in "01":
        events = EventAccumulator(str(tmp_path / version))
        events.Reload()
        scalars.append(len(events.Scalars("direct")))
    assert scalars[0] == scalars[1] == 12


def test_batches_come_through_the_transfer_hooks_as_in_training() -> None:
    """on_before_batch_transfer, transfer_batch_to_device and on_after_batch_transfer run, with trainer.training
    True."""
    stages = []

    class Hooked(First):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 1, batch[1]]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if watching:
                stages.append((self.trainer.training, self.trainer.validating))
            return [batch[0] * 2, batch[1]] if self.trainer.training else batch

    watching: list[bool] = []

    class Watch(pl.Callback):
        def on_validation_epoch_start(self, *_: Any) -> None:
            watching.append(True)

        def on_validation_batch_start(self, *_: Any) -> None:
            watching.clear()

    callback = BatchNormRecalibration(when="validation")
    trained, runner = fit(Watch(), callback, module=Hooked(), max_epochs=1, num_sanity_val_steps=0)
    assert stages[:6] == [(True, False)] * 6
    assert runner.state.stage is None
    assert matches_weights(trained.state_dict(), (training_data().tensors[0] + 1) * 2)


def test_the_users_dataloader_is_tried_before_training() -> None:
    """A loader whose batches don't go in is refused before the first step, and one that does is not consumed by the
    trial."""
    with pytest.raises(MisconfigurationException, match="forward="):
        fit(BatchNormRecalibration(dataloader=[{"image": torch.zeros(8, 4)}]), module=First(), val=None)
    data = loader()
    state = data.sampler.data_source
    fit(BatchNormRecalibration(dataloader=data), module=First(), val=None)
    assert data.sampler.data_source is state
