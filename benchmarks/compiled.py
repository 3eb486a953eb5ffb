"""What the averages cost in a compiled model, whose layers settle one by one: eight times conv, batch norm, ReLU.

Operations are those of dynamo's graph of the forward. The time is that of forward and backward of the program that the
backend ``aot_eager`` makes of it, all variants in turn; printed are the medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule
from turns import Step, ratios

from lightning_bn import Averaging, Exponential, Window, convert_batch_norm

SHAPE, BLOCKS = (8, 16, 8, 8), 8
AVERAGES: dict[str, Averaging | None] = {
    "averaging=None": None,
    "Exponential(0.1)": Exponential(0.1),
    "Window(20)": Window(20),
    "Window(20, pooled)": Window(20, pooled=True),
}
ASKED = {"Window(20)": ("330", "1.8"), "Window(20, pooled)": ("600", "2.2")}


def blocks() -> nn.Sequential:
    channels = SHAPE[1]
    each = [(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()) for _ in range(BLOCKS)]
    return nn.Sequential(*(module for block in each for module in block))


def compiled_step(model: nn.Module) -> tuple[Step, list[int]]:
    """Return a step of the compiled model, and the operations of its graphs, of which there is one when it has run."""
    operations: list[int] = []

    def backend(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        operations.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return aot_eager(graph, inputs)  # type: ignore[no-any-return]

    compiled: Callable[[Tensor], Tensor] = torch.compile(model, backend=backend, fullgraph=True)
    batch = torch.randn(SHAPE)
    return lambda: compiled(batch).sum().backward(), operations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 2 * (len(AVERAGES) + 2)
    plain = blocks()
    models = {"torch's layers": plain, "torch's layers again": copy.deepcopy(plain)}
    models |= {name: convert_batch_norm(copy.deepcopy(plain), each) for name, each in AVERAGES.items()}
    steps, counts = {}, {}
    for name, model in models.items():
        steps[name], counts[name] = compiled_step(model)
        steps[name]()
    found = ratios(steps, "cpu", options.rounds, 10)
    print("| compiled | operations | asked | time | asked |")
    print("|---|---:|---:|---:|---:|")
    for name, ratio in found.items():
        operations, (most, longest) = counts[name], ASKED.get(name, ("", ""))
        graphs = str(operations[0]) if len(operations) == 1 else f"{operations}"
        print(f"| {name} | {graphs} | {most and f'<= {most}'} | {ratio:.2f} | {longest and f'<= {longest}'} |")


if __name__ == "__main__":
    main()
