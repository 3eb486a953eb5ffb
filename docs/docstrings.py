"""For the reference: makes the docstrings ones that Griffe understands; what Python's help shows stays as it is."""

from __future__ import annotations

import re
from typing import Any

import griffe

LAYERS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")


class Docstrings(griffe.Extension):
    """Names the examples as Griffe does, links public names to their pages, and completes what only refers."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """A layer says what its inputs are and sends its reader to the base class, which has no page: join the two."""
        module = pkg["layers.batch_norm"]
        rest = module["AveragedBatchNorm"].docstring.value.partition("\n\n")[2]
        for name in LAYERS:
            docstring = module[name].docstring
            first, _, example = docstring.value.partition("\n\n")
            docstring.value = "\n\n".join([re.split(r"[;.]\s", first)[0] + ".", rest, example])
        self._walk(pkg, {name for name, member in pkg.members.items() if member.is_alias})

    def _walk(self, obj: griffe.Object, public: set[str]) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _linked(re.sub(r"(?m)^(\s*)Example:$", r"\1Examples:", obj.docstring.value), public)
        for member in obj.members.values():
            if not member.is_alias:
                self._walk(member, public)


def _linked(text: str, public: set[str]) -> str:
    """Make a link of each public name in single backticks; those of another kind are arguments, and stay."""
    return re.sub(
        r"(?<!`)`(\w+)`(?!`)",
        lambda found: f"[{found[0]}][lightning_bn.{found[1]}]" if found[1] in public else found[0],
        text,
    )
