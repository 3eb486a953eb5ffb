"""Recalibrated copies of checkpoint files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks.both_lightnings import (
    LightningModule,
    MisconfigurationException,
    ModelCheckpoint,
    ShardingStrategy,
    Trainer,
)
from lightning_bn.checkpoints.atomic_file import write_atomically
from lightning_bn.ranks.collective import Ranks
from lightning_bn.sets.part import SetPart

KINDS = ("best", "last")


def check_kinds(trainer: Trainer, kinds: Sequence[str]) -> None:
    """Raise unless the Trainer's checkpoint callbacks will write files of all `kinds` to a local disk.

    Raises:
        MisconfigurationException: with the argument to change.
    """
    if getattr(trainer, "fast_dev_run", False):
        return  # no file is written then
    writers = _writers(trainer)
    if kinds and isinstance(trainer.strategy, ShardingStrategy):
        raise MisconfigurationException(
            f"BatchNormRecalibration(checkpoints={tuple(kinds)!r}): {type(trainer.strategy).__name__} spreads the "
            "parameters over ranks, and no copy of such a checkpoint can be recalibrated here. Leave out checkpoints=, "
            "and recalibrate before "
            "each is saved, BatchNormRecalibration(when='validation'), or after it is loaded: recalibrate(module, "
            "batches)."
        )
    call = f"BatchNormRecalibration(checkpoints={tuple(kinds)!r})"
    if kinds and not writers:
        raise MisconfigurationException(
            f"{call}: the Trainer has no ModelCheckpoint. Leave out checkpoints=, or add one."
        )
    if "last" in kinds and not any(writer.save_last for writer in writers):
        raise MisconfigurationException(
            f"{call}: no 'last' checkpoint is going to be written. Use ModelCheckpoint(save_last=True)."
        )
    for writer in writers if kinds else ():
        if "://" in str(writer.dirpath):
            raise MisconfigurationException(
                f"{call}: {writer.dirpath} is not on a local disk, where alone a file can be renamed atomically."
            )


def files_of(trainer: Trainer, kinds: Iterable[str]) -> list[Path]:
    """Return the checkpoint files of the given kinds, each once; a kind without a file is warned of."""
    if getattr(trainer, "fast_dev_run", False):
        return []
    paths = {kind: [getattr(writer, f"{kind}_model_path") for writer in _writers(trainer)] for kind in kinds}
    for kind, found in paths.items():
        if not any(found):
            rank_zero_warn(
                f"BatchNormRecalibration: no {kind!r} checkpoint was written, so there is none to recalibrate."
            )
    return list(dict.fromkeys(Path(path) for found in paths.values() for path in found if path))


def files_from_before(trainer: Trainer, moment: float) -> list[Path]:
    """Return the checkpoint files of the Trainer that were written before `moment`, in seconds since 1970, and have no
    recalibrated copy."""
    kept = [
        path
        for writer in _writers(trainer)
        for path in (*getattr(writer, "best_k_models", ()), writer.best_model_path, writer.last_model_path)
    ]
    found = [Path(path) for path in dict.fromkeys(map(str, kept)) if path and "://" not in path]
    old = [path for path in found if path.is_file() and path.stat().st_mtime <= moment]
    return [path for path in old if not _copy_of(path).is_file()]


def statistics_in(module: LightningModule) -> dict[str, Tensor]:
    """Return the running statistics of all batch norms, in all their sets, and the spread of images that they keep, by
    key of the ``state_dict``."""
    prefixes = tuple(
        f"{path}." if path else ""
        for path, child in module.named_modules(remove_duplicate=False)
        if (isinstance(child, _BatchNorm) and child.running_mean is not None) or isinstance(child, SetPart)
    )
    names = {prefix + name for prefix in prefixes for name in ("running_mean", "running_var")}
    spreads = tuple(f"{prefix}spread." for prefix in prefixes)
    return {key: value for key, value in module.state_dict().items() if key in names or key.startswith(spreads)}


def write_recalibrated_copy(
    trainer: Trainer, module: LightningModule, path: Path, recalibrate: Callable[[], object]
) -> None:
    """Write ``<name>-recalibrated.ckpt`` next to `path`: the same checkpoint, with statistics that match its weights.

    The file's weights are recalibrated inside the module, which has its own again at the end, also on an exception.
    Every rank takes part; the first reads and writes.
    """
    ranks, is_first = Ranks(task=f"the recalibrated copy of {path}"), trainer.is_global_zero
    # The file is this very run's.
    read = partial(torch.load, path, map_location="cpu", weights_only=False)
    checkpoint: dict[str, Any] = ranks.each(lambda: read() if is_first else {})
    state: dict[str, Tensor] = trainer.strategy.broadcast(checkpoint.get("state_dict", {}))
    with ranks.told(), _holding(module, state):
        recalibrate()
        statistics = {key: value.detach().cpu().clone() for key, value in statistics_in(module).items()}
    checkpoint.get("state_dict", {}).update(statistics)
    ranks.each(lambda: write_atomically(checkpoint, _copy_of(path)) if is_first else None)


@contextmanager
def _holding(module: LightningModule, state: dict[str, Tensor]) -> Iterator[None]:
    before = {
        key: value.detach().clone() if isinstance(value, Tensor) else value
        for key, value in module.state_dict().items()
    }
    try:
        module.load_state_dict(state)
        yield
    finally:
        module.load_state_dict(before)


def _copy_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}-recalibrated{path.suffix}")


def _writers(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
