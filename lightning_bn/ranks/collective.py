"""What the ranks of a process group tell each other, and how none waits for one that failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_TOLD = "_lightning_bn_told"
"""On an error that ranks have told each other, in a task within another: in the outer one nobody waits to hear it."""

Group = Any  # torch's ProcessGroup, which a torch built without distributed does not have; None is the default group


class RankError(RuntimeError):
    """Another rank failed, and with it what all ranks were to do together."""


class LostRankError(RankError):
    """The process group itself failed: a rank is gone, and with it whatever ranks do together from now on."""


@contextmanager
def naming_failures(task: str, when: str, afterwards: str = "") -> Iterator[None]:
    """Let an error of the process group say what was going on: a rank may have died, or never have come.

    Raises:
        LostRankError: for a lost connection, a timeout, or a message of another size.
    """
    try:
        yield
    except RankError:
        raise
    except RuntimeError as error:  # what torch raises for all of them
        raise LostRankError(
            f"{task}: the process group failed {when}: {error} A rank has died, hangs, or did something else "
            f"meanwhile.{afterwards and ' '}{afterwards}"
        ) from error


class Ranks:
    """The processes that carry out one task together; outside a process group, this one alone.

    Args:
        group: their process group, None for the default one.
        task: the call, as an error is to show it.
        afterwards: what an error says of the state that a failure leaves.

    Raises:
        ValueError: this process is not in `group`.

    Attributes:
        parted: whether a rank has failed, and the others know: nobody comes to another meeting.
    """

    def __init__(self, group: Group = None, *, task: str = "a meeting of all ranks", afterwards: str = "") -> None:
        self.group = group
        self.task = task
        self.afterwards = afterwards
        self.parted = False
        self.size, self.rank = 1, 0
        if dist.is_available() and dist.is_initialized():
            self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
            if self.rank < 0:
                raise ValueError(
                    f"{task}: process_group does not contain this process, rank {dist.get_rank()} of "
                    f"{dist.get_world_size()}. Call it only on the ranks of the group, or pass each rank the group "
                    "that it is in."
                )

    @property
    def are_several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    @property
    def is_first(self) -> bool:
        """Whether this process acts for all: the first rank, or the only one."""
        return self.rank == 0

    def share(self, value: T) -> list[T]:
        """Return the `value` of every rank, in the order of ranks; every rank must call it as often. Alone:
        ``[value]``.

        Raises:
            RankError: a rank called `fail` instead, or is gone.
        """
        answers = self._gather((value, None)) if self.are_several else [(value, None)]
        failures = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(answers) if failure is not None]
        if failures:
            self.parted = True
            raise RankError(
                f"{self.task} failed on " + "; ".join(failures) + f".{self.afterwards and ' '}{self.afterwards}"
            )
        return [value for value, _ in answers]

    def agree(self, values: Mapping[str, object]) -> None:
        """Compare `values` with those of the other ranks, before anything is done that needs them to be the same.

        Raises:
            ValueError: on every rank, with the first name under which they differ.
        """
        everyone = self.share(dict(values))
        for name, own in everyone[0].items():
            for rank, theirs in enumerate(everyone):
                if theirs.get(name) != own:
                    raise ValueError(
                        f"{self.task}: {name} is {own!r} on rank 0 and {theirs.get(name)!r} on rank {rank}. Every rank "
                        "must call it with the same model and the same arguments."
                    )

    def fail(self, error: BaseException) -> None:
        """Take this rank's turn in the next `share`, so that the others learn of the failure and do not wait; nothing
        if they know already."""
        if self.are_several and not self.parted:
            self.parted = True
            if not isinstance(error, RankError) and not hasattr(error, _TOLD):
                self._gather((None, f"{type(error).__name__}: {error}"))
                setattr(error, _TOLD, True)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell the others of an error that the block raises; they are in a `share` meanwhile."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def each(self, function: Callable[[], T]) -> T:
        """Return what `function` returns here, once it has ended on all ranks; where they meet in it, by `share`.

        Raises:
            RankError: it failed on another rank; on that one, its own error.
        """
        with self.told():
            result = function()
        self.share(None)
        return result

    def broadcast(self, value: T, source: int) -> T:
        """Return the `value` of the rank `source`, by its place in the group."""
        if not self.are_several:
            return value
        box = [value]
        with self.named("while one rank told the others something"):
            dist.broadcast_object_list(box, group=self.group, group_src=source)
        return box[0]

    def add_up(self, sums: Tensor) -> Callable[[], None]:
        """Begin to replace `sums` by its sum over all ranks, in place; return what waits for that."""
        with self.named("while the ranks were adding up"):
            work = dist.all_reduce(sums, group=self.group, async_op=True)

        def wait() -> None:
            with self.named("while the ranks were adding up"):
                work.wait()

        return wait

    def named(self, when: str) -> AbstractContextManager[None]:
        """Let an error of the process group say what was going on, see `naming_failures`."""
        return naming_failures(self.task, when, self.afterwards)

    def _gather(self, message: object) -> list[tuple[T, str | None]]:
        answers: list[tuple[T, str | None]] = [None] * self.size  # type: ignore[list-item]
        with self.named("while the ranks were telling each other what they have"):
            dist.all_gather_object(answers, message, group=self.group)
        return answers
