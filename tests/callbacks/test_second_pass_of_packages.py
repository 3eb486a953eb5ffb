"""Loaders of other packages under a pass over their data in the middle of a fit: batches, weights, and the loader's
state in every checkpoint are those of the fit without. Each runs where its package is installed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fitting import quiet, trainer
from small_data import ROWS as X
from small_data import WithPosition
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import BatchNormRecalibration, CompareAverages, Window
from lightning_bn.callbacks.both_lightnings import MisconfigurationException

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages, about themselves


class WithState(WithPosition):
    """What `StatefulDataLoader` asks a data set for."""

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def torchdata_of_rows(folder: Path, **how: Any) -> Any:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    return stateful.StatefulDataLoader(X, 5, shuffle=True, **how)


def torchdata_with_workers(folder: Path) -> Any:
    return torchdata_of_rows(folder, num_workers=1, persistent_workers=True)


def torchdata_of_a_stream(folder: Path) -> Any:
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader(WithState(), 5)


def litdata_streaming(folder: Path) -> Any:
    litdata = pytest.importorskip("litdata")
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_size=8)
    for index, row in enumerate(X):
        writer[index] = {"x": row}
    writer.done()
    writer.merge(1)
    return litdata.StreamingDataLoader(litdata.StreamingDataset(str(folder), shuffle=True), batch_size=5)


def litdata_in_torchs_loader(folder: Path) -> Any:
    return DataLoader(litdata_streaming(folder).dataset, 5)


def webdataset_shuffled(folder: Path) -> Any:
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(folder / "rows.tar")) as archive:
        for index, row in enumerate(X):
            archive.write({"__key__": f"{index:03d}", "x.npy": row.numpy()})
    rows = wds.WebDataset(str(folder / "rows.tar"), shardshuffle=False, seed=3).shuffle(20, seed=3)
    return wds.WebLoader(rows.decode().to_tuple("x.npy"), batch_size=5)


def monai_random_transforms(folder: Path) -> Any:
    data = pytest.importorskip("monai.data")
    from monai.transforms import Compose, RandGaussianNoised, RandScaleIntensityd

    noise = [RandGaussianNoised("x", prob=0.7), RandScaleIntensityd("x", factors=0.5, prob=0.5)]
    rows = data.Dataset([{"x": row.numpy()} for row in X], Compose(noise).set_random_state(3))
    return data.DataLoader(rows, batch_size=5, shuffle=True)


def datasets_of_rows(folder: Path) -> Any:
    rows = pytest.importorskip("datasets").Dataset.from_dict({"x": X.tolist()})
    return DataLoader(rows.with_format("torch"), 5, shuffle=True)


def _stream() -> Any:
    rows = pytest.importorskip("datasets").Dataset.from_dict({"x": X.tolist()})
    return rows.to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=10)


def datasets_stream(folder: Path) -> Any:
    return DataLoader(_stream().with_format("torch"), 5)


def datasets_stream_with_noise(folder: Path) -> Any:
    generator = np.random.default_rng(0)
    noisy = _stream().map(lambda row: {"x": [value + float(generator.random()) for value in row["x"]]})
    return DataLoader(noisy.with_format("torch"), 5)


def datasets_in_torchdata(folder: Path) -> Any:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    return stateful.StatefulDataLoader(_stream().with_format("torch"), 5)


def mosaicml_streaming(folder: Path) -> Any:
    streaming = pytest.importorskip("streaming")

    class Rows(streaming.StreamingDataset):
        def __getitem__(self, index: int) -> Any:
            return torch.tensor(super().__getitem__(index)["x"])

    with streaming.MDSWriter(out=str(folder), columns={"x": "ndarray:float32:4"}, size_limit=400) as writer:
        for row in X:
            writer.write({"x": row.numpy()})
    return streaming.StreamingDataLoader(Rows(local=str(folder), shuffle=True, batch_size=5), batch_size=5)


LOADERS: list[Callable[[Path], Any]] = [
    torchdata_of_rows,
    torchdata_with_workers,
    torchdata_of_a_stream,
    litdata_streaming,
    litdata_in_torchs_loader,
    webdataset_shuffled,
    monai_random_transforms,
    datasets_of_rows,
    datasets_stream,
    datasets_stream_with_noise,
    datasets_in_torchdata,
]
CALLBACKS: dict[str, Callable[..., pl.Callback]] = {
    "recalibration": lambda **how: BatchNormRecalibration(when="validation", **how),
    "comparison": lambda **how: CompareAverages({"window": Window(5)}, batch=False, **how),
}


class Seeing(pl.LightningModule):
    """Notes each training batch; batches are tensors, or hold one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.seen: list[float] = []

    def forward(self, batch: Any) -> Tensor:
        return self.net(_rows(batch))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(_rows(batch).double().sum()))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def _rows(batch: Any) -> Tensor:
    while not isinstance(batch, Tensor):
        batch = batch["x"] if isinstance(batch, dict) else batch[0]
    return (batch.as_tensor() if hasattr(batch, "as_tensor") else batch).float()


class Saves(pl.Callback):
    """Keeps the loops' state of a checkpoint after each batch and each validation: the loader's is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.states: list[Any] = []

    def save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self.states.append(torch.load(self.path, weights_only=False)["loops"]["fit_loop"])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer)


def fitted(make: Callable[[Path], Any], folder: Path, *callbacks: pl.Callback) -> tuple[Seeing, list[Any]]:
    folder.mkdir()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    loader, module, saves = make(folder), Seeing(), Saves(folder.with_suffix(".ckpt"))
    with quiet():
        trainer(*callbacks, saves, max_epochs=2, max_steps=40, num_sanity_val_steps=0, val_check_interval=3).fit(
            module, loader, DataLoader(X[:8], 4)
        )
    return module, saves.states


def difference(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Where two states differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from difference(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from difference(*pair, f"{where}[{index}]")
    elif not np.array_equal(np.asarray(one), np.asarray(other)):
        yield where


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("make", LOADERS, ids=lambda make: make.__name__)
def test_the_fit_is_that_without_the_pass(make: Callable[[Path], Any], callback: str, tmp_path: Path) -> None:
    """What differs from fit to fit without it (a time, a folder) is left out."""
    plain, states = fitted(make, tmp_path / "plain")
    again, states_again = fitted(make, tmp_path / "again")
    assert plain.seen == again.seen
    module, states_with = fitted(make, tmp_path / "with", CALLBACKS[callback]())
    assert module.seen == plain.seen
    for one, other in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(one, other)
    own = set(difference(states, states_again))
    assert [place for place in difference(states, states_with) if place not in own] == []


@pytest.mark.parametrize("callback", CALLBACKS)
def test_one_that_has_no_second_pass_is_refused(callback: str, tmp_path: Path) -> None:
    """A second iterator over mosaicml's data set ends the first; with a data set of its own the fit is as without."""
    with pytest.raises(MisconfigurationException, match=r"reads a Rows, whose position is in shared memory"):
        fitted(mosaicml_streaming, tmp_path / "refused", CALLBACKS[callback]())
    (tmp_path / "other").mkdir()
    other = CALLBACKS[callback](dataloader=mosaicml_streaming(tmp_path / "other"))
    module, _ = fitted(mosaicml_streaming, tmp_path / "with", other)
    plain, _ = fitted(mosaicml_streaming, tmp_path / "plain")
    assert module.seen == plain.seen
