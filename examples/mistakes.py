"""Three classic mistakes on the digits, and what ModeCheck says of each.

Run `python examples/mistakes.py`; `--epochs 1` is enough to see them all.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from digits import Classifier, ConvNet, digits

from lightning_bn import Finding, ModeCheck


def pretrained() -> Classifier:
    """A trained network in eval mode, as `from_pretrained` returns one, in a module that is about to be fine-tuned."""
    module = Classifier(ConvNet())
    fit(module, epochs=1)
    module.model.eval()
    return module


def frozen() -> Classifier:
    """A backbone frozen by requires_grad=False alone."""
    module = Classifier(ConvNet())
    for block in list(module.model.children())[:3]:
        block.requires_grad_(False)
    return module


class TrainsInValidation(Classifier):
    """A validation step that wants the training loss too, and calls self.train() for it."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.train()
        self.log("loss_on_validation_data", self.training_step(batch, batch_idx))
        self.eval()
        super().validation_step(batch, batch_idx)


def fit(module: pl.LightningModule, epochs: int) -> list[Finding]:
    check = ModeCheck(action="log")
    silent: dict[str, Any] = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
    )
    pl.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[check], **silent).fit(module, *digits())
    return check.findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    # Lightning's remarks on workers and intervals; ModeCheck itself is asked to log, not to warn.
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)

    for title, module in (
        ("A pretrained network, still in eval mode", pretrained()),
        ("A backbone frozen by requires_grad=False", frozen()),
        ("self.train() in validation_step", TrainsInValidation(ConvNet())),
    ):
        print(f"\n{title}\n{'-' * len(title)}")
        for finding in fit(module, options.epochs):
            if finding.level != "info":
                print(finding)


if __name__ == "__main__":
    main()
