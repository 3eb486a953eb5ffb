"""Callbacks for the Lightning Trainer: each translates hooks into calls of the core, and none computes anything
itself."""

import sys

__all__ = ["LOG_BEFORE"]

# Each Lightning package, as it is imported, makes its own logger the one that both speak through. Whoever set a level
# or a handler did so for the package that they imported, so `both_lightnings`, which imports both, puts this back.
LOG_BEFORE = (
    sys.modules["lightning_utilities.core.rank_zero"].log
    if "lightning.pytorch" in sys.modules or "pytorch_lightning" in sys.modules
    else None
)
