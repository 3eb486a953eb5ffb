"""Plain DDP, and DDP with `BatchNormSync`, in real Trainers over two real processes."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import processes
import pytest
import torch
from fitting import trainer
from lightning.pytorch.strategies import DDPStrategy
from processes import own_batch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_bn import (
    ActivationStatsMonitor,
    Averaging,
    BatchNormRecalibration,
    BatchNormSync,
    Cumulative,
    Exponential,
    ModeCheck,
    Window,
    convert_batch_norm,
    recalibrate,
)

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
from communication import sent

AVERAGES: dict[str, Averaging | None] = {
    "torch": None,
    "Exponential": Exponential(0.1),
    "Window": Window(3),
    "Cumulative": Cumulative(),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "find_unused_parameters": {"strategy": DDPStrategy(find_unused_parameters=True)},
    "static_graph": {"strategy": DDPStrategy(static_graph=True)},
    "accumulated": {"strategy": "ddp", "accumulate_grad_batches": 2},
}
STEPS = 6


class Module(pl.LightningModule):
    """Two batch norms, a head, and a head that nothing uses; the batches of a rank come from the step."""

    def __init__(self, averaging: Averaging | None, *, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        norms = [nn.BatchNorm1d(6), nn.BatchNorm1d(6)]
        self.layers = nn.Sequential(nn.Linear(4, 6), norms[0], nn.ReLU(), nn.Linear(6, 6), norms[1], nn.Linear(6, 1))
        self.unused = nn.Linear(4, 4) if unused else None
        if averaging is not None:
            convert_batch_norm(self, averaging)
        self.seen: list[Tensor] = []

    def forward(self, batch: Tensor) -> Tensor:
        return self.layers(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(own_batch(self.global_rank, batch_idx)).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(self(torch.linspace(-1, 1, 20).reshape(5, 4)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def fit(module: Module, folder: Path, *callbacks: pl.Callback, **options: Any) -> dict[str, Any]:
    runner = trainer(
        *callbacks, devices=2, default_root_dir=folder, use_distributed_sampler=False, num_sanity_val_steps=0, **options
    )
    runner.fit(module, DataLoader(torch.zeros(STEPS), batch_size=None), DataLoader(torch.zeros(1), batch_size=None))
    return {"state": copy.deepcopy(module.state_dict()), "outputs": module.seen}


def _rank(rank: int, world: int, folder: Path, port: int) -> dict[Any, Any]:
    processes.environment(rank, world, port)
    results: dict[Any, Any] = {}
    for option, arguments in OPTIONS.items():
        for name, averaging in AVERAGES.items():
            module = Module(averaging, unused=option == "find_unused_parameters")
            results[option, name] = fit(module, folder, **copy.deepcopy(arguments))
    for only in (False, True):
        callbacks = [
            ActivationStatsMonitor(every_n_steps=2),
            ModeCheck(action="raise"),
            BatchNormRecalibration(when="validation"),
        ]
        synchronised = {"strategy": "ddp", "plugins": [BatchNormSync(statistics_only=only)], "sync_batchnorm": True}
        results["sync", only] = fit(Module(Window(3)), folder, **synchronised)
        synchronised["plugins"] = [BatchNormSync(statistics_only=only)]
        results["callbacks", only] = fit(Module(Window(3)), folder, *callbacks, **synchronised)
        results["empty", only] = _one_is_empty(rank, only)
        results["recalibrated", only] = _recalibrated(rank, only)
        results["evaluated", only] = _evaluated_alone(rank, only)
    results["sent"] = {name: _sent(averaging) for name, averaging in AVERAGES.items()}
    return results


def _one_is_empty(rank: int, only: bool) -> dict[str, Tensor]:
    """Train in steps in which rank 1, then both have no data."""
    layer = convert_batch_norm(nn.BatchNorm1d(4), Window(3))
    BatchNormSync(statistics_only=only).apply(layer)
    for step, sizes in enumerate([(8, 8), (8, 0), (0, 0), (5, 8)]):
        layer(own_batch(rank, step)[: sizes[rank]])
    return layer.state_dict()


def _recalibrated(rank: int, only: bool) -> dict[str, Tensor]:
    """Recalibrate, while synchronised, on three batches here and two there."""
    model = nn.Sequential(nn.BatchNorm1d(4), convert_batch_norm(nn.BatchNorm1d(4), Window(3)))
    sync = BatchNormSync(statistics_only=only)
    sync.apply(model)
    before = [layer.__dict__.get("forward") for layer in model]
    recalibrate(model, [own_batch(rank, step) for step in range(3 - rank)], progress=False)
    assert before == [layer.__dict__.get("forward") for layer in model]
    sync.revert(model)
    assert "forward" not in model[0].__dict__
    return model.state_dict()


def _evaluated_alone(rank: int, only: bool) -> Tensor:
    """Evaluate a layer without running statistics, synchronised, on rank 0 alone."""
    layer = nn.BatchNorm1d(4, track_running_stats=False)
    BatchNormSync(statistics_only=only).apply(layer)
    return layer.eval()(own_batch(0, 0)) if rank == 0 else torch.zeros(())


def _sent(averaging: Averaging | None) -> Any:
    model = DistributedDataParallel(Module(averaging))

    def step() -> None:
        model(own_batch(0, 0)).sum().backward()

    step(), step()
    return sent(step)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return processes.results(_rank, 2, tmp_path_factory.mktemp("ranks"), processes.free_port())


def statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: value
        for key, value in state.items()
        if key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
    }


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.rpartition(".")[2] in ("weight", "bias")}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", [name for name in AVERAGES if name != "torch"])
def test_trains_as_torchs_layer(results: list[dict[Any, Any]], option: str, name: str) -> None:
    """Weights are those of torch's BatchNorm under DDP, to the bit, whatever the average; an exponential one's
    statistics are too."""
    for result in results:
        plain, ours = result[option, "torch"]["state"], result[option, name]["state"]
        assert equal(weights(ours), weights(plain))
        if name == "Exponential":
            assert equal(statistics(ours), statistics(plain))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", AVERAGES)
def test_ranks_agree_at_evaluation(results: list[dict[Any, Any]], option: str, name: str) -> None:
    """On the same batch all ranks have the same outputs, by the same statistics: rank 0's."""
    one, two = (result[option, name] for result in results)
    assert torch.equal(one["outputs"][0], two["outputs"][0])
    assert equal(statistics(one["state"]), statistics(two["state"]))


def test_a_window_is_of_rank_0s_batches(results: list[dict[Any, Any]]) -> None:
    """The first layer's statistics, with the weights replayed, are the average over the last three batches of rank
    0."""
    for result in results:
        state = Module(None).state_dict()
        first = torch.nn.functional.linear
        module = Module(None)
        means = []
        optimizer = module.configure_optimizers()
        for step in range(STEPS):
            means.append(first(own_batch(0, step), *module.layers[0].parameters()).detach().double().mean(0))
            optimizer.zero_grad()
            for rank in range(2):  # the mean over the ranks of the gradients
                (module(own_batch(rank, step)).square().mean() / 2).backward()
            optimizer.step()
        expected = torch.stack(means[-3:]).mean(0)
        torch.testing.assert_close(
            result["ddp", "Window"]["state"]["layers.1.running_mean"].double(), expected, rtol=1e-4, atol=1e-5
        )
        assert not torch.equal(result["ddp", "Window"]["state"]["layers.0.weight"], state["layers.0.weight"])


@pytest.mark.parametrize("name", AVERAGES)
def test_sends_what_torchs_layer_sends(results: list[dict[Any, Any]], name: str) -> None:
    """As many collectives and bytes: no history is broadcast. The buffers and the gradients are."""
    for result in results:
        assert result["sent"][name] == result["sent"]["torch"]
    module = Module(None)
    buffers = sum(buffer.nbytes for buffer in module.buffers())
    gradients = sum(parameter.nbytes for parameter in module.parameters())
    sent_by_torch = results[0]["sent"]["torch"]
    assert sent_by_torch["broadcast"][1] == buffers
    assert sent_by_torch["all_reduce"][1] == gradients


@pytest.mark.parametrize("only", [False, True])
def test_synchronised_ranks_agree_to_the_bit(results: list[dict[Any, Any]], only: bool) -> None:
    """Statistics and history are the same on both ranks, without a broadcast's help; so all of it is in a checkpoint of
    rank 0."""
    one, two = (result["sync", only]["state"] for result in results)
    assert equal(one, two)


@pytest.mark.parametrize("only", [False, True])
def test_callbacks_in_a_synchronised_fit(results: list[dict[Any, Any]], only: bool) -> None:
    """Monitor, check and recalibration change no weight of a fit with the plugin, and find no mistake in it."""
    for result in results:
        assert equal(weights(result["callbacks", only]["state"]), weights(result["sync", only]["state"]))
    one, two = (result["callbacks", only]["state"] for result in results)
    assert equal(one, two)


@pytest.mark.parametrize("only", [False, True])
def test_an_empty_rank(results: list[dict[Any, Any]], only: bool) -> None:
    """A batch that is empty on one rank is the other's; one that is empty on all ranks counts for nothing."""
    alone = convert_batch_norm(nn.BatchNorm1d(4), Window(3))
    for step, sizes in enumerate([(8, 8), (8, 0), (0, 0), (5, 8)]):
        batch = torch.cat([own_batch(rank, step)[: sizes[rank]] for rank in range(2)])
        if len(batch):
            alone(batch)
    for result in results:
        for key, value in statistics(alone.state_dict()).items():
            torch.testing.assert_close(result["empty", only][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("only", [False, True])
def test_recalibrates_while_synchronised(results: list[dict[Any, Any]], only: bool) -> None:
    """Ranks may have unequal numbers of batches: the statistics are those of all data, the layers' collectives stand
    aside."""
    data = torch.cat([own_batch(rank, step) for rank in range(2) for step in range(3 - rank)]).double()
    for result in results:
        torch.testing.assert_close(
            result["recalibrated", only]["0.running_mean"].double(), data.mean(0), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            result["recalibrated", only]["0.running_var"].double(), data.var(0), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("only", [False, True])
def test_eval_waits_for_nobody(results: list[dict[Any, Any]], only: bool) -> None:
    """A layer without running statistics normalises in eval with its own batch, and needs no other rank for it."""
    expected = nn.BatchNorm1d(4, track_running_stats=False)(own_batch(0, 0))
    torch.testing.assert_close(results[0]["evaluated", only], expected)
