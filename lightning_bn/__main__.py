"""``python -m lightning_bn``, the same as ``lightning-bn``."""

from __future__ import annotations

import sys

from lightning_bn.cli import main

if __name__ == "__main__":
    sys.exit(main())
