"""Two domains in alternation: clean digits, and digits in negative with less contrast, batch by batch.

With one set of running statistics evaluation normalises either domain with a mixture of both. Compared are one set,
one set with mixed batches (half of each domain, which training then normalises together), and with `StatisticsSets` a
set for each domain.
"""

from __future__ import annotations

from contextlib import nullcontext

import pandas as pd
import torch
import torch.nn.functional as F
from digits import Classifier, ConvNet, accuracy, arguments, digits, fit, images_and_labels
from torch import Tensor

from lightning_bn import StatisticsSets

DOMAINS = ("clean", "negative")
KINDS = ("one set, in alternation", "one set, mixed batches", "a set for each domain")


def shown(images: Tensor, domain: str) -> Tensor:
    """Return `images` as they are in a domain."""
    return images if domain == "clean" else 0.7 - 0.5 * images


class TwoDomains(Classifier):
    """Trains on either domain in turn, or on mixed batches."""

    def __init__(self, kind: str) -> None:
        super().__init__(ConvNet(), lr=0.1)
        self.kind = kind
        self.sets = StatisticsSets(self.model, DOMAINS) if kind == "a set for each domain" else None

    def forward(self, images: Tensor, domain: str = DOMAINS[0]) -> Tensor:
        with nullcontext() if self.sets is None else self.sets.use(domain):
            return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self.kind == "one set, mixed batches":
            half = len(images) // 2
            images = torch.cat((images[:half], shown(images[half:], "negative")))
            return F.cross_entropy(self(images, "clean"), labels)
        domain = DOMAINS[batch_idx % 2]
        return F.cross_entropy(self(shown(images, domain), domain), labels)


def main() -> None:
    options = arguments(__doc__, epochs=8)
    rows = []
    for seed in range(options.seeds):
        for kind in KINDS:
            torch.manual_seed(seed)
            training, validation = digits(seed=seed)
            module = TwoDomains(kind)
            fit(module, training, epochs=options.epochs)
            images, labels = images_and_labels(validation)
            for domain in DOMAINS:
                found = accuracy(module, shown(images, domain), labels, domain=domain)
                rows.append({"statistics": kind, "domain": domain, "acc": found})
    grouped = pd.DataFrame(rows).groupby(["statistics", "domain"], sort=False)["acc"]
    table = pd.DataFrame({"mean": grouped.mean(), "worst": grouped.min(), "best": grouped.max()})
    print(f"Validation accuracy in percent over {options.seeds} seeds, {options.epochs} epochs\n")
    print(table.to_string(float_format="%.1f"))


if __name__ == "__main__":
    main()
