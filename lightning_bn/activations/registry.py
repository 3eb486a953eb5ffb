"""The statistics of a layer: one entry each, from which the measurement, the table, the limits, the colours, the
scalars, the charts and the advice are made. A new statistic is an entry, and nothing else.
"""

from __future__ import annotations

from lightning_bn.activations.activation_columns import ACTIVATION_COLUMNS
from lightning_bn.activations.column import Column, Statistic
from lightning_bn.activations.parameter_columns import PARAMETER_COLUMNS

ENTRIES: tuple[Column, ...] = (*ACTIVATION_COLUMNS, *PARAMETER_COLUMNS)
COLUMNS: tuple[str, ...] = tuple(entry.name for entry in ENTRIES)
"""All columns of the table, in their order."""
STATISTICS: dict[str, Statistic] = {entry.name: entry for entry in ENTRIES if isinstance(entry, Statistic)}
"""By column, those that are summed up over the layers."""
DRIFT_STATISTICS: tuple[str, ...] = tuple(
    name for name in COLUMNS if name.startswith("drift") and not name.endswith("_z")
)
"""What `activations.drift` measures of a batch norm, in the order of its columns."""
