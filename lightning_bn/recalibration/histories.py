"""What averages remember beyond the running statistics, where ranks have averaged different batches."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.settlement import rule_of
from lightning_bn.ranks.collective import Ranks
from lightning_bn.recalibration.transaction import StatisticsChange


def with_one_history(changes: list[StatisticsChange | None], ranks: Ranks) -> list[StatisticsChange | None]:
    """Return `changes` with the first rank's histories in them, where the ranks have different ones; every rank must
    call it."""
    own = [{} if change is None else _history(change.layer) for change in changes]
    prints = ranks.share([_fingerprint(history) for history in own])
    different = [place for place, each in enumerate(zip(*prints, strict=True)) if len(set(each)) > 1]
    if not different:
        return changes
    first = ranks.broadcast({place: _on_cpu(own[place]) for place in different}, 0)
    changed = list(changes)
    for place in different:
        change = changes[place]
        if change is not None:
            old = {name: tensor.clone() for name, tensor in own[place].items()}
            new = {name: value.to(old[name]) for name, value in first[place].items()}
            changed[place] = replace(change, tensors=own[place], old_history=old, new_history=new)
    return changed


def _history(layer: _BatchNorm) -> dict[str, Tensor]:
    """The tensors themselves of all that a later batch's average depends on."""
    count = layer.num_batches_tracked
    return rule_of(layer).state() | ({} if count is None else {"num_batches_tracked": count})


def _fingerprint(history: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in history.values():
        found.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _on_cpu(history: dict[str, Tensor]) -> dict[str, Tensor]:
    # A part of a tensor would be sent with the whole of it.
    return {name: tensor.detach().cpu().clone() for name, tensor in history.items()}
