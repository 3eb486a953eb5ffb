"""Blocks of numbers as text, of the same shape time after time."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

import numpy as np
from numpy.typing import NDArray

__all__ = ["NumberBlock"]


class NumberBlock:
    """Writes blocks of numbers in which the same cells have a value time after time.

    It keeps a format string of the whole block, and one ``%`` fills it: a call for each number takes several times as
    long.

    Args:
        digits: significant ones.
        missing: the text of a cell without a value.
        quote: what stands around nan and inf.

    Example:
        >>> block = NumberBlock(3, missing="", quote='"')
        >>> values, has_value = np.array([[0.12345, np.nan], [7.0, 1e9]]), np.array([[True, True], [True, False]])
        >>> block.text(values, has_value, "", lambda cells: " | ".join(",".join(row) for row in cells))
        '0.123,"nan" | 7,'
    """

    def __init__(self, digits: int, *, missing: str, quote: str = "") -> None:
        self._number = f"%.{digits}g"
        self._missing = missing
        self._quote = quote
        self._key: Hashable = None
        self._form = ""

    def text(
        self,
        values: NDArray[np.float64],
        has_value: NDArray[np.bool_],
        key: Hashable,
        lay_out: Callable[[list[list[str]]], str],
    ) -> str:
        """Return the text of a block.

        Args:
            values: (R, C).
            has_value: (R, C).
            key: what `lay_out` depends on besides its argument.
            lay_out: makes a format string of the cells, row by row; they are to stay in their order, and a "%" in any
                other text is to be doubled.
        """
        is_number = np.isfinite(values) & has_value
        others = values[has_value & ~is_number]
        now = (key, values.shape, has_value.tobytes(), is_number.tobytes(), others.tobytes())
        if now != self._key:
            self._key, self._form = now, lay_out(self._cells(values, has_value))
        return self._form % tuple(values[is_number].tolist())

    def _cells(self, values: NDArray[np.float64], has_value: NDArray[np.bool_]) -> list[list[str]]:
        return [
            [self._cell(value) if has else self._missing for value, has in zip(*row, strict=True)]
            for row in zip(values.tolist(), has_value.tolist(), strict=True)
        ]

    def _cell(self, value: float) -> str:
        return self._number if math.isfinite(value) else f"{self._quote}{value}{self._quote}"
