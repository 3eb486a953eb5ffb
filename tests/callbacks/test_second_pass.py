"""A pass over the training data in the middle of a fit leaves what the batches come from as it was: the fit sees the
same batches as without it."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fitting import trainer
from small_data import ROWS as X
from small_data import WithPosition
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from lightning_bn import BatchNormRecalibration, CompareAverages, Window, recalibrate
from lightning_bn.callbacks.both_lightnings import MisconfigurationException


class Seeing(pl.LightningModule):
    """Notes each training batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.seen: list[float] = []

    def forward(self, batch: Tensor) -> Tensor:
        return self.net(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(float(batch.double().sum()))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def shuffled(epoch: int) -> Iterator[list[int]]:
    places = list(range(40))
    random.Random(epoch).shuffle(places)
    return (places[start : start + 5] for start in range(0, 40, 5))


class NestedState(Sampler[list[int]]):
    """Counts its epochs in a dict."""

    def __init__(self) -> None:
        self.state = {"epoch": 0}

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[list[int]]:
        self.state["epoch"] += 1
        return shuffled(self.state["epoch"])


class NoSampler:
    """A batch sampler without torch's base class, that counts in a tensor."""

    def __init__(self) -> None:
        self.epoch = torch.zeros(1, dtype=torch.int64)

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[list[int]]:
        self.epoch += 1
        return shuffled(int(self.epoch))


class Noise:
    """A transform with a generator of its own."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __call__(self, rows: Tensor) -> Tensor:
        return rows + float(self.generator.random())


class Transformed(Dataset[Tensor]):
    def __init__(self) -> None:
        self.transforms = [{"first": Noise()}]

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Tensor:
        return self.transforms[0]["first"](X[index])


class Collate(Noise):
    def __call__(self, rows: Any) -> Tensor:
        return super().__call__(torch.stack(list(rows)))


def closing_over_a_generator() -> Callable[[Any], Tensor]:
    generator = np.random.default_rng(0)
    return lambda rows: torch.stack(list(rows)) + float(generator.random())


class InSharedMemory(IterableDataset[Tensor]):
    """Its position is in memory that its workers would share."""

    def __init__(self) -> None:
        self.memory = SharedMemory(create=True, size=1)
        weakref.finalize(self, self.memory.unlink)

    def __iter__(self) -> Iterator[Tensor]:
        self.memory.buf[0] = 0
        while self.memory.buf[0] < len(X):
            self.memory.buf[0] += 1
            yield X[self.memory.buf[0] - 1]


class OwnLoader:
    """No DataLoader: counts how often it was iterated, and gives other batches each time."""

    def __init__(self) -> None:
        self.times = 0

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[Tensor]:
        self.times += 1
        return iter((X + self.times).split(5))


LOADERS: dict[str, Callable[[], Any]] = {
    "a dataset with a position": lambda: DataLoader(WithPosition(), 5),
    "a sampler whose state is a dict": lambda: DataLoader(X, batch_sampler=NestedState()),
    "a sampler that is no Sampler": lambda: DataLoader(X, batch_sampler=NoSampler()),
    "a generator in a dataset's transform": lambda: DataLoader(Transformed(), 5, shuffle=True),
    "a generator in collate_fn": lambda: DataLoader(X, 5, shuffle=True, collate_fn=Collate()),
    "a generator that collate_fn closes over": lambda: DataLoader(X, 5, collate_fn=closing_over_a_generator()),
    "a loader class of its own": OwnLoader,
}
CALLBACKS: dict[str, Callable[..., pl.Callback]] = {
    "recalibration": lambda **how: BatchNormRecalibration(when="validation", **how),
    "comparison": lambda **how: CompareAverages({"window": Window(5)}, batch=False, **how),
}


def seen(loader: Any, *callbacks: pl.Callback) -> list[float]:
    module = Seeing()
    torch.manual_seed(1)
    runner = trainer(*callbacks, max_epochs=2, max_steps=40, num_sanity_val_steps=0, val_check_interval=3)
    runner.fit(module, loader, DataLoader(X[:8], 4))
    return module.seen


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("loader", LOADERS)
def test_the_fit_sees_the_batches_that_it_sees_without(loader: str, callback: str) -> None:
    """With a pass in the middle of each epoch."""
    assert seen(LOADERS[loader](), CALLBACKS[callback]()) == seen(LOADERS[loader]())


def test_what_a_datamodule_counts_in_its_hooks_stays() -> None:
    """Its transfer hook sees the batches of a pass too."""

    class Data(pl.LightningDataModule):
        transferred = 0

        def train_dataloader(self) -> Any:
            return DataLoader(X, 5)

        def val_dataloader(self) -> Any:
            return DataLoader(X[:8], 4)

        def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            self.transferred += 1
            return batch

    counts = []
    for callbacks in ((), (BatchNormRecalibration(when="validation"),)):
        data = Data()
        trainer(*callbacks, num_sanity_val_steps=0).fit(Seeing(), datamodule=data)
        counts.append(data.transferred)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("callback", CALLBACKS)
def test_a_loader_that_is_its_own_iterator_is_refused(callback: str) -> None:
    """At the start of the fit, with the argument that does without it; which works."""
    with pytest.raises(MisconfigurationException, match=r"its own iterator.*dataloader="):
        seen((batch for batch in X.split(5)), CALLBACKS[callback]())
    other = CALLBACKS[callback](dataloader=DataLoader(X, 5))
    batches = [float(batch.double().sum()) for batch in X.split(5)]
    module = Seeing()
    runner = trainer(other, num_sanity_val_steps=0, val_check_interval=3)
    runner.fit(module, (batch for batch in X.split(5)), DataLoader(X[:8], 4))
    assert module.seen == batches


@pytest.mark.parametrize("callback", CALLBACKS)
def test_a_position_in_shared_memory_is_refused(callback: str) -> None:
    """At the start of the fit, by the name of the data set; with one of its own the fit sees what it sees without."""
    with pytest.raises(MisconfigurationException, match=r"InSharedMemory, whose position is in shared.*dataloader="):
        seen(DataLoader(InSharedMemory(), 5), CALLBACKS[callback]())
    other = CALLBACKS[callback](dataloader=DataLoader(InSharedMemory(), 5))
    assert seen(DataLoader(InSharedMemory(), 5), other) == seen(DataLoader(InSharedMemory(), 5))


def test_a_pass_iterates_a_loader_once() -> None:
    """A second iter() would start workers twice."""
    times: list[int] = []

    class Count(OwnLoader):
        def __iter__(self) -> Iterator[Tensor]:
            times.append(1)
            return super().__iter__()

    trainer(BatchNormRecalibration(dataloader=Count()), num_sanity_val_steps=0).fit(
        Seeing(), DataLoader(X, 5), DataLoader(X[:8], 4)
    )
    assert len(times) == 2  # one to find out how a batch goes in, one for the pass


def test_a_running_persistent_loader_keeps_its_rest() -> None:
    """Outside of a Trainer too: recalibrate() iterates a copy."""
    loader = DataLoader(X, 5, num_workers=1, persistent_workers=True)
    running = iter(loader)
    next(running)
    recalibrate(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), loader, progress=False)
    assert sum(1 for _ in running) == 7
