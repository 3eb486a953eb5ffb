"""A loop of one's own with Fabric, in two processes: windowed layers, statistics of all ranks, `watch` around it, then
`recalibrate`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from digits import ConvNet, digits
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_bn import BatchNormSync, Window, convert_batch_norm, recalibrate, watch


@torch.no_grad()
def accuracy(fabric: Fabric, model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the accuracy over the batches of all ranks."""
    model.eval()
    right, total = torch.zeros(2)
    for images, labels in loader:
        right += (model(images).argmax(1) == labels).sum()
        total += len(labels)
    right, total = torch.as_tensor(fabric.all_reduce(torch.stack((right, total)), reduce_op="sum"))
    return (right / total).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2)
    options = parser.parse_args()

    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=options.devices)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    plain = convert_batch_norm(ConvNet(), Window(20))
    # Each rank normalises with its own batch; the statistics are those of all. Before setup: DDP wraps the layers as
    # they are then.
    BatchNormSync(statistics_only=True).apply(plain)
    model, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.5))
    training, validation = fabric.setup_dataloaders(*digits())

    with watch(model) as findings:
        for _ in range(options.epochs):
            model.train()
            for images, labels in training:
                optimizer.zero_grad()
                fabric.backward(F.cross_entropy(model(images), labels))
                optimizer.step()

    before = accuracy(fabric, model, validation)
    # Every rank with its part of the data; all end with the same statistics. The module inside: its names are the
    # user's.
    report = recalibrate(plain, training, exact=True, progress=False)
    after = accuracy(fabric, model, validation)

    ours = torch.cat([buffer.flatten().float() for buffer in plain.buffers()])
    differing = int(torch.as_tensor(fabric.all_reduce((ours != fabric.broadcast(ours)).sum(), reduce_op="sum")))
    if fabric.global_rank == 0:
        serious = [finding.code for finding in findings if finding.level != "info"]
        print(
            f"{fabric.world_size} processes, {options.epochs} epochs; watch found: {', '.join(serious) or 'nothing'}\n"
        )
        print(f"{'running statistics':<22}{'accuracy':>10}")
        print(f"{'window 20':<22}{before:>10.3f}\n{'recalibrated':<22}{after:>10.3f}\n")
        print(f"recalibrated from {report.samples} images; buffers that differ between ranks: {differing}")
    fabric.barrier()


if __name__ == "__main__":
    main()
