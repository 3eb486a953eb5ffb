"""The command ``lightning-bn``."""

from __future__ import annotations

from lightning_bn.cli.program import main

__all__ = ["main"]
