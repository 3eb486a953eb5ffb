"""What the callers of the rules may ask for: codes, actions, patterns of module names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from lightning_bn.rules import RULES
from lightning_bn.rules.rule import Setting

__all__ = ["check_action", "check_codes", "check_patterns", "mendable_codes"]


def mendable_codes() -> list[str]:
    """Return the codes that ``fix`` takes."""
    return [code for code, rule in RULES.items() if rule.mendable]


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
        alone = replace(setting, allow_eval=(pattern,))
        if not any(alone.allows_eval(name) for name in names):
            parts = [name for name in names if name and "." not in name]
            raise ValueError(
                f"{setting.caller}(allow_eval=[{pattern!r}]): no module has such a name. Give module names or patterns "
                f"of them, as named_modules() has them; the first level here is {', '.join(parts) or 'empty'}."
            )
