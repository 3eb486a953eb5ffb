"""Whatever is raised at whatever point, all is as before; after success, all but the statistics."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recalibration_models import busy, everything, statistics
from states import as_bytes
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset, WeightedRandomSampler

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

from lightning_bn import recalibrate
from lightning_bn.recalibration import kept_tensors, storages
from lightning_bn.recalibration.transaction import StatisticsChange


@pytest.fixture(autouse=True)
def every_tensor_is_copied_lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is copied at once, the smallest neither: what is left alone rests on torch's lazy copies."""

    def refuse(tensor: Tensor) -> None:
        raise AssertionError(f"copied at once: {tensor}")

    monkeypatch.setattr(storages, "_PLACEHOLDER", 0)
    monkeypatch.setattr(kept_tensors, "_Copied", refuse)


def loader() -> DataLoader[Any]:
    data = TensorDataset(torch.randn(20, 3))
    return DataLoader(
        data, 4, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(1)), generator=torch.Generator()
    )


def generators(batches: DataLoader[Any]) -> list[bytes]:
    return [as_bytes(g.get_state()) for g in (batches.generator, batches.sampler.generator)]


class Boom(BaseException):
    """Nothing that anybody catches."""


def raise_in_call(number: int, call: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(10**6))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise Boom
        return call(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("where", ["batches", "forward", "layer", "hook", "write", "bar"])
def test_an_exception_anywhere_changes_nothing(
    where: str, number: int, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the loader, the model, a layer, a hook, at the k-th write of the result, in the progress bar."""
    model, batches = busy(), loader()
    source: Any = batches
    forward = None
    if where == "batches":
        source = failing_after(number, batches)
    elif where == "forward":
        forward = raise_in_call(number, lambda model, batch: model(batch[0]))
    elif where == "layer":
        monkeypatch.setattr(model.last, "_check_input_dim", raise_in_call(number, model.last._check_input_dim))
    elif where == "hook":
        model.ours.register_forward_hook(raise_in_call(number, lambda *_: None))
    elif where == "write":
        number = number % 3
        monkeypatch.setattr(StatisticsChange, "_write", raise_in_call(number, StatisticsChange._write))
    else:
        monkeypatch.setattr(
            "lightning_bn.recalibration.collection.tqdm.update", raise_in_call(number, lambda self, n=1: None)
        )
    before, drawn = everything(model), generators(batches)
    with pytest.raises(Boom):
        recalibrate(model, source, exact=exact, forward=forward, progress=where == "bar")
    assert before == everything(model)
    if where != "batches":
        assert drawn == generators(batches)


def failing_after(number: int, batches: DataLoader[Any]) -> Iterator[Any]:
    for count, batch in enumerate(batches):
        if count == number:
            raise Boom
        yield batch


@pytest.mark.parametrize("exact", [False, True])
def test_after_success_all_but_the_statistics_is_as_before(exact: bool) -> None:
    """Same objects, same storage, same flags, hooks, momenta, counters, random states, loader."""
    model, batches = busy(), loader()
    before, drawn, old = everything(model), generators(batches), statistics(model)
    recalibrate(model, batches, exact=exact, progress=False)
    after = everything(model)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {f"{layer}:running_{which}" for layer in ("first", "ours", "last") for which in ("mean", "var")}
    assert {key: before[key][:4] for key in changed} == {key: after[key][:4] for key in changed}
    assert drawn == generators(batches)
    assert torch.equal(old["frozen"][0], model.frozen.running_mean)


def test_an_epoch_drawn_after_it_is_the_one_that_would_have_been_drawn() -> None:
    """Shuffled by torch's generator, by the loader's, by a sampler's, by the dataset's own numpy and Python
    generators."""
    for make in LOADERS:
        orders = []
        for recalibrated_before in (False, True):
            torch.manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            batches = make()
            if recalibrated_before:
                recalibrate(nn.BatchNorm1d(1), batches, num_batches=2, progress=False)
            orders.append(torch.cat([batch if isinstance(batch, Tensor) else batch[0] for batch in batches]))
        assert torch.equal(*orders)


class Noisy(Dataset[Tensor]):
    """A dataset that draws from generators of its own."""

    def __init__(self, generator: Any, draw: Callable[[Any], float]) -> None:
        self.generator, self.draw = generator, draw

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index + float(self.draw(self.generator)) + np.random.rand() + random.random()])


DATA = TensorDataset(torch.arange(12.0).unsqueeze(1))


class Wrapped:
    """A loader of somebody's around another."""

    def __init__(self) -> None:
        self.inner = [DataLoader(DATA, 4, shuffle=True, generator=torch.Generator())]

    def __iter__(self) -> Iterator[Any]:
        yield from self.inner[0]


LOADERS = [
    lambda: DataLoader(DATA, 4, shuffle=True),
    lambda: DataLoader(DATA, 4, shuffle=True, generator=torch.Generator()),
    lambda: DataLoader(DATA, 4, sampler=WeightedRandomSampler([1.0] * 12, 12, generator=torch.Generator())),
    lambda: DataLoader(Noisy(np.random.default_rng(0), lambda g: g.random()), 4),
    lambda: DataLoader(Noisy(np.random.RandomState(0), lambda g: g.rand()), 4),
    lambda: DataLoader(Noisy(random.Random(0), lambda g: g.random()), 4),
    lambda: DataLoader(DATA, 4, shuffle=True, num_workers=1),
    Wrapped,
]
