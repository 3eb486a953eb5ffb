"""Synchronised layers compute, over real processes, what one process computes on the batches put together."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import processes
import pytest
import torch
import torch.distributed as dist
from fitting import trainer
from third_party import BatchNormAct2d, Foreign
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import BatchNorm1d, BatchNorm2d, BatchNormSync, Cumulative, Exponential, Window, convert_batch_norm
from lightning_bn.ranks.synchronization import merge_statistics

STEPS = 4
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: nn.BatchNorm2d(3),
    "torch, cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "torch, not affine": lambda: nn.BatchNorm2d(3, affine=False),
    "ours": lambda: BatchNorm2d(3),
    "debiased": lambda: BatchNorm2d(3, averaging=Exponential(0.3, debias=True)),
    "window": lambda: BatchNorm2d(3, averaging=Window(3)),
    "pooled window": lambda: BatchNorm2d(3, averaging=Window(2, pooled=True)),
    "pooled cumulative": lambda: BatchNorm2d(3, averaging=Cumulative(pooled=True)),
    "subclass": lambda: BatchNormAct2d(3),
    "served subclass": lambda: convert_batch_norm(BatchNormAct2d(3), Window(3)),
}
# Samples per rank, unequal, an empty rank and one with a single value per channel among them.
SIZES = {2: [(5, 2), (0, 4), (3, 1), (2, 2)], 3: [(5, 2, 1), (0, 4, 3), (3, 0, 0), (2, 2, 2)]}


def build(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def data(world: int, step: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return each rank's batch, the gradient that flows back to it, and its mask, of images of one pixel."""
    generator = torch.Generator().manual_seed(step)
    sizes = SIZES[world][step]
    parts = [
        torch.randn(sum(sizes), 3, 1, 1, generator=generator, dtype=torch.float64).to(dtype) * 2 + 1 for _ in range(2)
    ]
    mask = torch.rand(sum(sizes), 1, 1, generator=generator) > 0.3
    mask[:2] = True
    return tuple(list(part.split(sizes)) for part in (*parts, mask))


def run(layer: nn.Module, batch: Tensor, gradient: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    batch = batch.clone().requires_grad_()
    layer.zero_grad()
    output = layer(batch) if mask is None else layer(batch, mask)
    output.backward(gradient)
    return {
        "output": output.detach(),
        "input.grad": batch.grad,
        **{f"{k}.grad": p.grad.clone() for k, p in layer.named_parameters()},
    }


def cases() -> list[tuple[str, torch.dtype, bool]]:
    names = [(name, dtype, False) for name in LAYERS for dtype in (torch.float32, torch.float64)]
    return names + [(name, torch.float64, True) for name in ("ours", "window", "pooled window")]


def _rank(rank: int, world: int, folder: Path) -> dict[Any, Any]:
    processes.join_group(rank, world, folder / "store")
    results: dict[Any, Any] = {}
    for case in cases():
        name, dtype, masked = case
        layer = build(name, dtype)
        before = set(layer.__dict__), type(layer), list(layer.state_dict())
        sync = BatchNormSync()
        assert sync.apply(layer) is layer
        steps = []
        for step in range(STEPS):
            batches, gradients, masks = data(world, step, dtype)
            steps.append(run(layer, batches[rank], gradients[rank], masks[rank] if masked else None))
        sync.revert(layer)
        assert (set(layer.__dict__), type(layer), list(layer.state_dict())) == before
        results[case] = steps, layer.state_dict()
    results["statistics only"] = [_statistics_only(rank, name) for name in LAYERS]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        BatchNormSync().apply(nn.Sequential(nn.BatchNorm1d(2), OfItsOwn()))
    results["told"] = [str(one.message) for one in told]
    return results


class OfItsOwn(nn.Module):
    """A norm that is no subclass of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2, 2))


def _statistics_only(rank: int, name: str) -> tuple[dict[str, Tensor], int]:
    """Train a model that calls its layer twice; return its state and the collectives it took."""
    layer = build(name, torch.float64)
    model = nn.Sequential(layer, layer)
    sync = BatchNormSync(statistics_only=True)
    sync.apply(model)
    calls = 0
    add_up = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return add_up(*args, **kwargs)

    dist.all_reduce = counted
    try:
        for step in range(STEPS):
            model(own_batch(rank, step))
    finally:
        dist.all_reduce = add_up
        sync.revert(model)
    model(own_batch(rank, 99))  # reverted: this one is the rank's own
    return layer.state_dict(), calls


def own_batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(3 + rank, 3, 2, 2, generator=generator, dtype=torch.float64) + 2 * rank


@pytest.fixture(scope="module", params=[2, 3])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict[Any, Any]]]:
    return request.param, processes.results(_rank, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_ranks_are_one_batch(world: tuple[int, list[dict[Any, Any]]], case: tuple[str, torch.dtype, bool]) -> None:
    """Outputs, all gradients and statistics of the ranks are those of one process on the concatenated batch."""
    size, results = world
    name, dtype, masked = case
    alone = build(name, dtype)
    tolerance = {"rtol": 1e-6, "atol": 4e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for step in range(STEPS):
        batches, gradients, masks = (torch.cat(parts) for parts in data(size, step, dtype))
        expected = run(alone, batches, gradients, masks if masked else None)
        ranks = [result[case][0][step] for result in results]
        for key, value in expected.items():
            together = (
                torch.cat([each[key] for each in ranks])
                if key in ("output", "input.grad")
                else sum(each[key] for each in ranks)
            )
            torch.testing.assert_close(together, value, **tolerance)
    for result in results:
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(result[case][1][key], value, **tolerance)
            assert torch.equal(result[case][1][key], results[0][case][1][key]), "ranks differ"


def test_what_is_left_out_is_named(world: tuple[int, list[dict[Any, Any]]]) -> None:
    """Once, with the reason; where no Trainer says which rank is the first, by each."""
    for result in world[1]:
        told = [text for text in result["told"] if "leaves out" in text]
        assert len(told) == 1
        assert "1 (OfItsOwn): it is no subclass of torch's batch norm" in told[0]


@pytest.mark.parametrize("index", range(len(LAYERS)), ids=list(LAYERS))
def test_statistics_only(world: tuple[int, list[dict[Any, Any]]], index: int) -> None:
    """Each rank normalises with its own batch; the average takes the moments of all; one collective a forward,
    for a layer called twice, and one more in the first."""
    size, results = world
    name = list(LAYERS)[index]
    normalising = [build(name, torch.float64) for _ in range(size)]
    averaging = build(name, torch.float64)
    for step in range(STEPS):
        first = [own_batch(rank, step) for rank in range(size)]
        second = [layer(batch).detach() for layer, batch in zip(normalising, first, strict=True)]
        averaging(torch.cat(first)), averaging(torch.cat(second))
    states = [result["statistics only"][index] for result in results]
    assert [calls for _, calls in states] == [STEPS + 1] * size
    for rank, (state, _) in enumerate(states):
        own = copy.deepcopy(averaging)
        own(own(own_batch(rank, 99)))
        for key, value in own.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-10, atol=1e-10)


class Module(pl.LightningModule):
    def __init__(self, world: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 3), BatchNorm1d(3, averaging=Window(3)), nn.Linear(3, 3), nn.BatchNorm1d(3)
        )
        self.world = world
        self.calls = 0
        self.layers[3].register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers(batch).square().sum() * self.world / 8  # DDP averages the ranks' gradients

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def _fit(rank: int, world: int, folder: Path, port: int) -> tuple[Any, ...]:
    processes.environment(rank, world, port)
    ddp = {"strategy": "ddp", "plugins": [BatchNormSync()], "sync_batchnorm": True} if world > 1 else {}
    runner = trainer(devices=world, default_root_dir=folder, use_distributed_sampler=False, **ddp)
    torch.manual_seed(1)
    rows = torch.randn(24, 4)
    module = Module(world)
    runner.fit(module, DataLoader([batch[rank::world] for batch in rows.split(8)], batch_size=None))
    return module.state_dict(), [str(type(layer)) for layer in module.layers], module.calls


def test_a_real_trainer(tmp_path: Path) -> None:
    """Trainer(strategy="ddp", plugins=[BatchNormSync()], sync_batchnorm=True) trains as one process does on whole
    batches."""
    results = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        results[world] = processes.results(_fit, world, folder, processes.free_port())
    ((expected, kinds, calls),) = results[1]
    for state, classes, seen in results[2]:
        assert (classes, seen) == (kinds, calls)
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)


class Twice(nn.Module):
    """Calls itself once, as a training_step calls its module, and fails where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.BatchNorm1d(3)

    def forward(self, batch: Tensor, inner: bool = False, fail: bool = False) -> Tensor:
        output = self.layer(batch) if inner else self(batch, inner=True) + self.layer(batch)
        if fail:
            raise KeyError
        return output


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    processes.join_group(0, 1, tmp_path / "store")
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_statistics_only_meets_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward inside the model's forward makes no collective of its own, and one that failed leaves nothing for the
    next."""
    calls, add_up = [], dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: (calls.append(1), add_up(*args, **kwargs))[1])
    model, batch = Twice(), torch.randn(8, 3)
    undo = merge_statistics(model)
    model(batch)
    assert (len(calls), int(model.layer.num_batches_tracked)) == (2, 2)
    with pytest.raises(KeyError):
        model(batch, fail=True)
    before = int(model.layer.num_batches_tracked)
    model(batch)
    assert int(model.layer.num_batches_tracked) == before + 2
    undo()


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize(
    "build", [nn.BatchNorm1d, BatchNorm1d, lambda width: convert_batch_norm(Foreign(width), Exponential(0.1))]
)
def test_statistics_only_follows_an_assigned_momentum(build: Callable[[int], nn.Module]) -> None:
    """Third parties set bn.momentum during a fit; it acts as without the plugin."""
    alone, merged = build(3), build(3)
    undo = merge_statistics(merged)
    for layer in (alone, merged):
        for momentum in (0.5, 0.01, None):
            layer.momentum = momentum
            torch.manual_seed(0)
            layer(torch.randn(8, 3) + 3)
    undo()
    torch.testing.assert_close(merged.running_mean, alone.running_mean)
    torch.testing.assert_close(merged.running_var, alone.running_var)


def test_a_copy_is_applied_to_nothing() -> None:
    """`ddp_spawn` pickles the Trainer with its callbacks; the copy has the arguments, and no model of the
    original's."""
    sync = BatchNormSync(group_size=4)
    for own in (pickle.loads(pickle.dumps(sync)), copy.deepcopy(sync)):
        assert (own.group_size, own.statistics_only) == (4, False)
        layer = BatchNorm1d(3)
        assert own.apply(layer) is layer
        assert not own.is_applied_to(layer)


def test_alone_it_does_nothing() -> None:
    """Without a process group the layers are left as they are."""
    layer = BatchNorm1d(3)
    before = dict(layer.__dict__)
    assert BatchNormSync().apply(layer) is layer
    assert layer.__dict__ == before
