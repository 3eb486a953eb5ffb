"""How many images `drift` has to know for its rate of false alarms to be the one asked for, by how images vary.

Rows of 30 values are drawn, as of a table, which follow three numbers that are normally distributed, or log-normally.
A row's two moments at a layer behind it are each value and its square. Printed is the share of alarms among 6000
batches of n rows, 100 after each of 60 measurements.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from drift import ALARMS, SIZES
from torch import Tensor, nn

from lightning_bn.recalibration.spread import DRAWS, Spread, logarithm, sizes_from

MEASUREMENTS, BATCHES, VALUES = 60, 100, 30
KINDS: dict[str, Callable[[Tensor], Tensor]] = {"normal": lambda numbers: numbers, "log-normal": torch.exp}


def p_values(spread: Spread, rows: Tensor) -> Tensor:
    """Return those of batches of rows, whose moments are (batches, n, 2, values)."""
    number = rows.shape[1]
    squares = ((rows.mean(1) - spread.center) / spread.scale).square().mean((1, 2))
    deviations = logarithm(squares / (1 / number + 1 / spread.all_images))
    reached = DRAWS - torch.searchsorted(spread.drawn(number).sort().values, deviations)
    return (reached + 1) / (DRAWS + 1)


def rates(kind: str, known: int) -> list[dict[str, float | str]]:
    torch.manual_seed(0)
    mixing = torch.rand(3, VALUES)

    def drawn(*shape: int) -> Tensor:
        values = KINDS[kind](torch.randn(*shape, 3)) @ mixing
        return torch.stack((values, values.square()), -2)

    sizes = [size for size in SIZES if size in sizes_from(known)]
    found: dict[int, list[Tensor]] = {size: [] for size in sizes}
    for _ in range(MEASUREMENTS):
        spread, images = Spread(VALUES), drawn(known)
        spread.measure(nn.BatchNorm1d(VALUES), images, images.mean(0), all_images=known, calls=1, measured_in=1)
        for size in sizes:
            found[size].append(p_values(spread, drawn(BATCHES, size)))
    return [
        {"rows": kind, "known": known, "n": size}
        | {f"alarm {alarm}": (torch.cat(values) <= alarm).float().mean().item() for alarm in ALARMS}
        for size, values in found.items()
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    table = pd.DataFrame([row for kind in KINDS for known in (170, 500, 2000) for row in rates(kind, known)])
    print(table.to_string(index=False, float_format="%.4f"))
