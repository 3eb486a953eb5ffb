"""What the callers of the rules say of a run, and may ask for: codes, actions, patterns of module names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_bn.discovery import ancestors
from lightning_bn.error_boundary import users_mistake


@dataclass(frozen=True)
class Setting:
    """What is known of a run apart from the model."""

    root: str = "model"
    """How the user's code calls the model."""
    caller: str = "check"
    """What the user called, and may give ``ignore`` and ``allow_eval``."""
    allow_eval: tuple[str, ...] = ()
    ranks: int = 1
    accumulated: int = 1
    """Batches a gradient is accumulated over."""
    manual: bool = False
    """Whether the user's code steps the optimizers, and so may call parts of the model in turn."""
    scheduled: bool = False
    """Whether a callback freezes parts of the model for a while and unfreezes them later."""
    repeats: bool = False
    """Whether an optimizer runs a batch several times at weights of its own, as LBFGS does; known of itself where
    `optimizers` are."""
    own_statistics: bool = False
    """Whether nothing makes the running statistics of one rank those of the others (DDP with
    ``broadcast_buffers=False``)."""
    classes: Mapping[str, type[nn.Module]] = field(default_factory=dict)
    """Of the batch-norm layers, before a strategy could replace them; empty if that is unknown."""
    share: Callable[[Any], list[Any]] | None = None
    """Returns what every rank passes, where there are others; all of them come at the end of an evaluation, where an
    exchange of the weights after training is looked for, and with `own_statistics` where an evaluation begins."""
    optimizers: Callable[[], Sequence[Optimizer]] | None = None
    """Asked anew each time, since parameters are added while a model is unfrozen; None if that is unknown."""

    def allows_eval(self, name: str) -> bool:
        """Whether the module, or one above it, is kept in eval mode on purpose."""
        return any(fnmatchcase(each, pattern) for pattern in self.allow_eval for each in (name, *ancestors(name)))


def check_codes(call: str, codes: Sequence[str], known: Iterable[str]) -> None:
    """Raise a ValueError that shows `call` unless all `codes` are among the `known` ones."""
    unknown = [code for code in codes if code not in known] if not isinstance(codes, str) else [codes]
    if unknown:
        raise ValueError(
            f"{call}: {unknown} is not among the codes {', '.join(known)}. Give a list of them, as in ['BN102']."
        )


def check_action(caller: str, action: str) -> None:
    """Raise a ValueError unless `action` is one of the three."""
    if action not in ("warn", "raise", "log"):
        raise ValueError(f'{caller}(action={action!r}): an action is "warn", "raise" or "log".')


def check_patterns(setting: Setting, names: Sequence[str]) -> None:
    """Raise a ValueError if a pattern of ``allow_eval`` matches none of the modules `names`."""
    for pattern in setting.allow_eval:
        if not any(fnmatchcase(name, pattern) for name in names):
            parts = [name for name in names if name and "." not in name]
            raise users_mistake(
                ValueError(
                    f"{setting.caller}(allow_eval=[{pattern!r}]): no module has such a name. Give module names or "
                    f"patterns of them, as named_modules() has them; the first level here is "
                    f"{', '.join(parts) or 'empty'}."
                )
            )
