"""Checkpoints: old ones, those of two processes, torch.distributed.checkpoint, and sharded parameters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
from digits import Classifier, ConvNet
from fitting import SaveAtStep7, trainer
from processes import own_batch
from sharded_fits import needs_sharding_on_a_cpu
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_bn import Averaging, BatchNormSync, Cumulative, Exponential, Window, convert_batch_norm, recalibrate

FIXTURE = Path(__file__).parent.parent / "fixtures" / "convnet_window20.ckpt"
CASES: list[tuple[Averaging, str, bool | None]] = [
    (Exponential(0.1, debias=True), "32-true", None),
    (Window(3), "32-true", None),
    (Window(3), "bf16-true", None),
    (Window(3, pooled=True), "bf16-mixed", None),
    (Window(3), "64-true", None),
    (Cumulative(pooled=True), "32-true", None),
    (Window(3), "32-true", False),
    (Window(3, pooled=True), "bf16-true", False),
    (Window(3), "32-true", True),
    (Cumulative(pooled=True), "64-true", True),
]
STEPS = 5


def load_fixture() -> tuple[Classifier, dict[str, Tensor]]:
    module = Classifier(convert_batch_norm(ConvNet(4), Window(20)))
    loaded = Classifier.load_from_checkpoint(FIXTURE, model=module.model, map_location="cpu", weights_only=True)
    return loaded, torch.load(FIXTURE, weights_only=True)["expected"]


def test_an_old_checkpoint_evaluates_as_it_did() -> None:
    """The file loads strictly with weights_only=True, and gives the outputs that were saved beside
    it."""
    module, expected = load_fixture()
    torch.testing.assert_close(module.eval()(expected["images"]), expected["logits"], rtol=1e-4, atol=1e-5)


def test_an_old_checkpoint_goes_on_with_its_window() -> None:
    """Seven batches more, and the statistics are those of the saved run's last thirteen and these."""
    module, expected = load_fixture()
    layer = module.model[0][1].train()
    batches = [torch.randn(16, 4, 5, 5) + t for t in range(7)]
    for batch in batches:
        layer(batch)
    means = [*expected["batches"][7:, 0].numpy(), *(batch.double().numpy().mean((0, 2, 3)) for batch in batches)]
    variances = [
        *expected["batches"][7:, 1].numpy(),
        *(batch.double().numpy().var((0, 2, 3), ddof=1) for batch in batches),
    ]
    np.testing.assert_allclose(layer.running_mean, np.mean(means, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.running_var, np.mean(variances, 0), rtol=1e-4, atol=1e-5)


def test_an_old_checkpoint_serves_a_plain_model() -> None:
    """Without the keys of the history it is a torch model's checkpoint."""
    _, expected = load_fixture()
    state = torch.load(FIXTURE, weights_only=True)["state_dict"]
    plain = Classifier(ConvNet(4))
    plain.load_state_dict({key: value for key, value in state.items() if ".averaging." not in key})
    torch.testing.assert_close(plain.eval()(expected["images"]), expected["logits"], rtol=1e-4, atol=1e-5)


def network(averaging: Averaging) -> nn.Sequential:
    torch.manual_seed(0)
    return convert_batch_norm(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1)), averaging)


class Module(pl.LightningModule):
    def __init__(self, averaging: Averaging) -> None:
        super().__init__()
        self.layers = network(averaging)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        batch = own_batch(self.global_rank, self.global_step).to(self.layers[0].weight.dtype)
        return self.layers(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.layers(own_batch(0, 0).to(self.layers[0].weight.dtype))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(case: tuple[Averaging, str, bool | None], path: Path, ckpt_path: Path | None = None) -> dict[str, Tensor]:
    averaging, precision, only = case
    options: dict[str, Any] = (
        {} if only is None else {"plugins": [BatchNormSync(statistics_only=only)], "sync_batchnorm": True}
    )
    runner = trainer(
        SaveAtStep7(path),
        strategy="ddp",
        devices=2,
        max_epochs=2,
        precision=precision,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )
    module = Module(averaging)
    if precision == "64-true":
        module.double()  # Lightning loads the checkpoint before it casts the module, and would round it to float32
    runner.fit(
        module,
        DataLoader(torch.zeros(STEPS), batch_size=None),
        DataLoader(torch.zeros(1), batch_size=None),
        ckpt_path=ckpt_path,
    )
    return copy.deepcopy(module.state_dict())


def _rank(rank: int, world: int, folder: Path, port: int) -> dict[Any, Any]:
    processes.environment(rank, world, port)
    results: dict[Any, Any] = {}
    for number, case in enumerate(CASES):
        whole = fit(case, Path(folder, f"{number}.ckpt"))
        results[number] = whole, fit(case, Path(folder, f"{number}-again.ckpt"), Path(folder, f"{number}.ckpt"))
    return results


def _sharded_rank(rank: int, world: int, folder: Path) -> dict[str, Any]:
    processes.join_group(rank, world, folder / "store")
    return _sharded(rank, f"{folder}/sharded")


def _sharded(rank: int, folder: str) -> dict[str, Any]:
    """Train with sharded parameters and beside it with DDP; save, load into a fresh model and train on; recalibrate."""
    alike, sharded = network(Window(3)), network(Window(3))
    for model in (alike, sharded):
        BatchNormSync(statistics_only=True).apply(model)
    replicated = DistributedDataParallel(alike, broadcast_buffers=False)
    fully_shard(sharded, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    train(replicated, rank, range(5)), train(sharded, rank, range(5))
    trained = whole(sharded)

    dcp.save(get_model_state_dict(sharded), checkpoint_id=folder)
    fresh = network(Window(3))
    BatchNormSync(statistics_only=True).apply(fresh)
    fully_shard(fresh)
    state = get_model_state_dict(fresh)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(fresh, state)
    loaded = whole(fresh)
    train(sharded, rank, range(5, 9)), train(fresh, rank, range(5, 9))

    plain = network(Window(3))
    state = plain.state_dict()
    dcp.load(state, checkpoint_id=folder)
    plain.load_state_dict(state)
    ends = {"went on": whole(sharded), "resumed": whole(fresh), "one process": plain.state_dict()}
    recalibrate(sharded, [own_batch(rank, step) for step in range(3 - rank)], progress=False)
    return {"replicated": whole(alike), "trained": trained, "loaded": loaded, "recalibrated": whole(sharded), **ends}


def train(model: nn.Module, rank: int, steps: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        optimizer.zero_grad()
        model(own_batch(rank, step)).square().mean().backward()
        optimizer.step()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state with every shard put together."""
    state = {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value
        for key, value in model.state_dict().items()
    }
    return {key: value.detach().clone() for key, value in state.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return processes.results(_rank, 2, tmp_path_factory.mktemp("ranks"), processes.free_port())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes.results(_sharded_rank, 2, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{averaging}-{precision}-{only}" for averaging, precision, only in CASES]
)
def test_two_processes_resume_to_the_bit(results: list[dict[Any, Any]], number: int) -> None:
    """A run over two processes, stopped in mid-epoch and mid-window, ends as one that was not: in all that a checkpoint
    would save.

    Without the plugin the history of rank 1 is neither saved nor used: its statistics are rank 0's.
    """
    for rank, result in enumerate(results):
        expected, resumed = result[number]
        assert set(resumed) == set(expected)
        for key, value in expected.items():
            if rank == 0 or ".averaging." not in key or CASES[number][2] is not None:
                assert torch.equal(resumed[key], value), key
        assert expected["layers.1.num_batches_tracked"] == 2 * STEPS


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


@needs_sharding_on_a_cpu
def test_sharded_is_replicated(sharded: list[dict[str, Any]]) -> None:
    """With fully_shard (FSDP2, gloo) a windowed model trains as under DDP, statistics and history included; all ranks
    have the same."""
    for result in sharded:
        replicated, trained = result["replicated"], result["trained"]
        assert set(trained) == set(replicated)
        for key, value in replicated.items():
            torch.testing.assert_close(trained[key], value, rtol=1e-5, atol=1e-6)
    statistics = [
        {key: value for key, value in result["trained"].items() if key.startswith("1.")} for result in sharded
    ]
    assert equal(*statistics)


@needs_sharding_on_a_cpu
def test_distributed_checkpoint(sharded: list[dict[str, Any]]) -> None:
    """What torch.distributed.checkpoint saved loads into a fresh sharded model, which trains on bit for bit, and into a
    plain one."""
    for result in sharded:
        assert equal(result["loaded"], result["trained"])
        assert equal(result["one process"], result["trained"])
        assert equal(result["resumed"], result["went on"])
        assert not equal(result["resumed"], result["loaded"])


@needs_sharding_on_a_cpu
def test_sharded_models_recalibrate(sharded: list[dict[str, Any]]) -> None:
    """recalibrate() gives a sharded model the statistics of all ranks' data under its weights, whatever batches each
    rank has."""
    data = torch.cat([own_batch(rank, step) for rank in range(2) for step in range(3 - rank)]).double()
    for result in sharded:
        state = result["recalibrated"]
        mean = (data @ state["0.weight"].double().T + state["0.bias"].double()).mean(0)
        torch.testing.assert_close(state["1.running_mean"].double(), mean, rtol=1e-5, atol=1e-5)
