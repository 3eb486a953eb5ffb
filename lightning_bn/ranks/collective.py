"""What the ranks of a process group tell each other, and how none waits for one that failed."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

__all__ = ["RankError", "in_group", "is_first_rank", "share", "tell_failure"]

T = TypeVar("T")


class RankError(RuntimeError):
    """Another rank failed, and with it what all ranks were to do together."""


def in_group() -> bool:
    """Tell whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    """Tell whether this process speaks for all: rank 0, or the only one."""
    return not in_group() or dist.get_rank() == 0


def share(value: T) -> list[T]:
    """Return the `value` of every rank, in the order of ranks; every rank must call it as often. Outside a group:
    ``[value]``.

    Raises:
        RankError: a rank called `tell_failure` instead.
    """
    answers = _gather((value, None)) if in_group() else [(value, None)]
    failures = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(answers) if failure is not None]
    if failures:
        raise RankError(
            "recalibrate() failed on " + "; ".join(failures) + ". The statistics of all ranks are as before."
        )
    return [value for value, _ in answers]


def tell_failure(error: BaseException) -> None:
    """Take this rank's turn in the next `share`, so that the others learn of the failure in place of waiting for ever."""
    if in_group() and not isinstance(error, RankError):
        _gather((None, f"{type(error).__name__}: {error}"))


def _gather(message: object) -> list[tuple[T, str | None]]:
    answers: list[tuple[T, str | None]] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(answers, message)
    return answers
