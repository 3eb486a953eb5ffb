"""What a training step sends between ranks, setting by setting: collectives and bytes, as torch's profiler saw gloo
carry them out.

Two processes train a ResNet-18 for 3x32x32 images under DistributedDataParallel. Counts do not depend on the machine,
nor on the number of ranks; the last columns put them into the alpha-beta model of `docs/distributed.md`, with rings and
with halving and doubling.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from resnet import resnet18
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_bn import BatchNormSync, Window, convert_batch_norm

BYTES = {"float": 4, "double": 8, "long int": 8, "unsigned char": 1, "bool": 1, "c10::Half": 2, "c10::BFloat16": 2}
SETTINGS: dict[str, tuple[bool, BatchNormSync | None]] = {
    "torch.nn.BatchNorm2d": (False, None),
    "Window(20)": (True, None),
    "Window(20), BatchNormSync(statistics_only=True)": (True, BatchNormSync(statistics_only=True)),
    "Window(20), BatchNormSync()": (True, BatchNormSync()),
}
SETTLES = 0.2  # seconds
Sent = dict[str, tuple[int, int]]  # by collective: calls, and bytes that this rank hands in


def sent(step: Callable[[], object]) -> Sent:
    """Return what one call of `step` makes this rank send."""
    # A thread of gloo's ends its event a moment after whoever waited goes on, and torch 2.6 gives no shapes of an event
    # that the profiler sees half of.
    time.sleep(SETTLES)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
        time.sleep(SETTLES)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    calls: Counter[str] = Counter()
    volume: Counter[str] = Counter()
    for event in events:
        if event.get("name", "").startswith("gloo:"):
            name = event["name"].removeprefix("gloo:")
            shapes, types = (event["args"][key] for key in ("Input Dims", "Input type"))
            calls[name] += 1
            volume[name] += sum(
                math.prod(shape) * BYTES[type] for shape, type in zip(shapes, types, strict=True) if type
            )
    return {name: (calls[name], volume[name]) for name in sorted(calls)}


def seconds(measured: Sent, ranks: int, latency: float, bandwidth: float, *, ring: bool) -> float:
    """Return the time of a step's collectives one after the other: rings or halving and doubling for what all send, a
    tree for a broadcast (see the page)."""
    doublings = math.ceil(math.log2(ranks))
    messages = ranks - 1 if ring else doublings
    total = 0.0
    for name, (calls, volume) in measured.items():
        if name == "all_reduce":
            total += calls * 2 * messages * latency + 2 * (ranks - 1) / ranks * volume / bandwidth
        elif name == "all_gather":
            total += calls * messages * latency + (ranks - 1) * volume / bandwidth
        else:
            total += doublings * (calls * latency + volume / bandwidth)
    return total


def _rank(rank: int, meeting: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    measured = {name: _measure(*setting) for name, setting in SETTINGS.items()}
    if rank == 0:
        Path(results).write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


def _measure(windowed: bool, sync: BatchNormSync | None) -> Sent:
    torch.manual_seed(0)
    model: nn.Module = resnet18()
    if windowed:
        convert_batch_norm(model, Window(20))
    if sync is not None:
        sync.apply(model)
    parallel = DistributedDataParallel(model)

    def step() -> None:
        parallel(torch.randn(4, 3, 32, 32)).sum().backward()
        list(model.buffers())  # waits for what is under way

    step(), step()  # DDP forms its buckets anew after the first
    return sent(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--latency", type=float, default=5e-6, help="of a message, in seconds")
    parser.add_argument("--bandwidth", type=float, default=25e9, help="of a link, in bytes per second")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        mp.spawn(_rank, (f"file://{folder}/meeting", str(results)), nprocs=2)
        measured = json.loads(results.read_text())
    names = ["broadcast", "all_reduce", "all_gather"]
    columns = [*(f"{name}s: calls, bytes" for name in names), f"{options.ranks} ranks, rings, ms", "doubling, ms"]
    print("| a step of | " + " | ".join(columns) + " |")
    print("|---|" + "---:|" * (len(names) + 2))
    for setting, collectives in measured.items():
        cells = ["{}, {:,}".format(*collectives.get(name, (0, 0))) for name in names]
        for ring in (True, False):
            time = seconds(collectives, options.ranks, options.latency, options.bandwidth, ring=ring)
            cells.append(f"{1e3 * time:.1f}")
        print(f"| {setting} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
