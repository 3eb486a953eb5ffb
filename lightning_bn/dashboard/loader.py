"""What TensorBoard's entry point names: it must import at once and can't fail, since TensorBoard starts with it."""

from __future__ import annotations

import logging
from typing import Any

from tensorboard.plugins.base_plugin import TBLoader


class Loader(TBLoader):  # type: ignore[misc]  # tensorboard has no types
    """Loads the plugin, or says why not."""

    def load(self, context: Any) -> Any:
        """Return the plugin; None, and a line in the log, where it can't be had."""
        try:
            from lightning_bn.dashboard.plugin import BatchNormPlugin

            return BatchNormPlugin(context)
        except Exception:
            logging.getLogger("tensorboard").exception("The batch norm tab is left out")
            return None
