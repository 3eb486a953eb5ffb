"""What the host does for a training step, where it is the bottleneck, as it is on a GPU: operations launched, and time.

The network is a ResNet with 52 batch norms and 49 ReLUs.
Operations of the averages are counted on the meta device, over a forward and a backward.
So are the Python functions and bytecodes of a whole step on the CPU, SGD included (of this version of Python).
Those of callbacks are counted in a real Trainer on the CPU, over whole steps, and compared with one without them.
"Host-bound step" is the time of forward, backward and SGD for 2 images of 3x32x32, stages 16 to 128 wide, one thread.
All variants are timed in turn; printed are the medians of the rounds' ratios, and of these over several processes.
The last column is the same on an accelerator, where there is one.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from multiprocessing import get_context

import lightning.pytorch as pl
import torch
from interpreted import count_python
from operations import Operations, count_operations, on_meta, operations_a_further_layer, peak_memory
from profiling import profile_steps
from resnet import resnet50
from torch import nn
from turns import ENDLESS, Step, ratios, trainer_step, training_step

from lightning_bn import ActivationStatsMonitor as Monitor
from lightning_bn import (
    Averaging,
    CompareAverages,
    Cumulative,
    Exponential,
    ModeCheck,
    Window,
    convert_batch_norm,
)
from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.watched_layers import select_layers

WIDTH, SHAPE = 4, (2, 3, 32, 32)  # of a bottleneck, inside; four times that outside
NORMS, LAYERS = 52, 101  # batch norms; and ReLUs
COUNTED = 50  # steps, so that what is done every tenth or fiftieth step has its share

TORCH, AGAIN = "torch's layers", "torch's layers again, for the noise"
AVERAGES: dict[str, Averaging | None] = {
    "averaging=None": None,
    "Exponential(0.1)": Exponential(0.1),
    "Exponential(0.1, debias)": Exponential(0.1, debias=True),
    "Cumulative()": Cumulative(),
    "Window(20)": Window(20),
    "Exponential(0.1, pooled)": Exponential(0.1, pooled=True),
    "Cumulative(pooled)": Cumulative(pooled=True),
    "Window(20, pooled)": Window(20, pooled=True),
}
ASKED = {"averaging=None": "1.03", "Exponential(0.1)": "1.03", "Window(20)": "1.06"}  # of the host-bound step


@dataclass
class Row:
    """A line of the table; what has no meaning there is empty."""

    what: str
    operations: float | None = None
    relative: float | None = None
    further: float | None = None
    calls: int | None = None
    bytecodes: int | None = None
    asked: str = ""
    times: dict[str, float] = field(default_factory=dict)  # by device, relative to the step without


def converted(averaging: Averaging | None) -> nn.Module:
    return convert_batch_norm(resnet50(WIDTH), averaging)


def rows_of_averages(devices: list[str], rounds: int, repeat: int) -> list[Row]:
    """Return a row for torch's layers and for each average."""
    rows = [_counted(TORCH, lambda model: model)]
    rows += [_counted(name, partial(convert_batch_norm, averaging=each)) for name, each in AVERAGES.items()]
    for row in rows[1:]:
        row.relative, row.further = row.operations / rows[0].operations, row.further - rows[0].further
        row.asked = f"<= 1.25; <= 0.5; <= {ASKED.get(row.what, '1.15' if 'pooled' in row.what else '-')}"
    for device in devices:
        images = torch.randn(SHAPE)
        steps: dict[str, Step] = {name: training_step(resnet50(WIDTH), device, images) for name in (TORCH, AGAIN)}
        steps |= {name: training_step(converted(each), device, images) for name, each in AVERAGES.items()}
        found = ratios(steps, device, rounds, repeat)
        for row in rows:
            row.times[device] = found[row.what]
            if device == "cpu":
                row.calls, row.bytecodes = count_python(steps[row.what])
        rows[0].times[device] = found[AGAIN]
    rows[0].asked, rows[0].relative = "(time: the same again, noise)", 1.0
    return rows


def _counted(name: str, convert: Callable[[nn.Sequential], nn.Module]) -> Row:
    step = on_meta(convert(resnet50(WIDTH)), *SHAPE)
    step()  # a first forward may set things up
    return Row(name, count_operations(step), further=operations_a_further_layer(convert))


@dataclass
class Variant:
    """A Trainer with a callback, and the one without that it is compared with."""

    without: str
    callback: Callable[[], pl.Callback]
    layers: int
    asked: str


def comparison() -> pl.Callback:
    return CompareAverages({"exponential": Exponential(0.1), "window": Window(20), "cumulative": Cumulative()})


PLAIN, WINDOWED = "Trainer, torch's layers", "Trainer, Window(20)"
MODELS: dict[str, Callable[[], nn.Module]] = {PLAIN: lambda: resnet50(WIDTH), WINDOWED: lambda: converted(Window(20))}
CALLBACKS = {
    "ModeCheck": Variant(PLAIN, lambda: ModeCheck(action="log"), NORMS, "<= 1.03"),
    "CompareAverages of three": Variant(PLAIN, comparison, NORMS, "<= 1.15"),
    "the same, model with Window(20)": Variant(WINDOWED, comparison, NORMS, "<= 1.15"),
    "monitor, between samples": Variant(
        PLAIN, partial(Monitor, verbose=False, every_n_steps=ENDLESS), LAYERS, "<= 1.01"
    ),
    "monitor, drift alone": Variant(
        PLAIN, partial(Monitor, verbose=False, every_n_steps=1, activations=False), NORMS, "<= 1.05"
    ),
    "monitor, a sampled step": Variant(PLAIN, partial(Monitor, verbose=False, every_n_steps=1), LAYERS, "<= 1.6"),
}


def rows_of_callbacks(devices: list[str], rounds: int, repeat: int) -> list[Row]:
    """Return a row for each callback; operations are those of a whole step on the CPU, on average."""
    rows = {name: Row(name, asked=each.asked) for name, each in CALLBACKS.items()}
    for device in devices:
        with ExitStack() as stack:
            steps = trainers(stack, device)
            if device == "cpu":
                _count_callbacks(rows, steps)
            found = ratios(steps, device, rounds, repeat)
        for name, row in rows.items():
            row.times[device] = found[name] / found[CALLBACKS[name].without]
    return list(rows.values())


def trainers(stack: ExitStack, device: str) -> dict[str, Step]:
    """Return a step of each Trainer; they end when `stack` is closed."""
    images = torch.randn(SHAPE)
    steps = {name: stack.enter_context(trainer_step(model(), device, images)) for name, model in MODELS.items()}
    for name, each in CALLBACKS.items():
        steps[name] = stack.enter_context(trainer_step(MODELS[each.without](), device, images, each.callback()))
    return steps


def _count_callbacks(rows: dict[str, Row], steps: dict[str, Step]) -> None:
    operations = {}
    for name, step in steps.items():
        for _ in range(3):  # a first batch may set things up
            step()
        with Operations() as seen:
            for _ in range(COUNTED):
                step()
        operations[name] = seen.calls.total() / COUNTED
    for name, row in rows.items():
        without = operations[CALLBACKS[name].without]
        row.operations, row.relative = operations[name], operations[name] / without
        row.further = (operations[name] - without) / CALLBACKS[name].layers
        row.calls, row.bytecodes = python_beyond(steps[name], steps[CALLBACKS[name].without])


def python_beyond(step: Step, without: Step) -> tuple[int, int]:
    """Return the Python calls and bytecodes of a step with a callback, beyond those of the step without it."""
    # A mean, so that what several steps have in common has its share: drift alone is evaluated every 16 steps.
    counted = [count_python(step) for _ in range(16)]
    calls, bytecodes = (round(statistics.mean(each)) for each in zip(*counted, strict=True))
    calls_before, bytecodes_before = count_python(without)
    return calls - calls_before, bytecodes - bytecodes_before


def rows_of_a_sample() -> list[Row]:
    """Return what the monitor's hooks launch in a sampled step, and the memory it adds, on the CPU and on no CPU."""
    model = resnet50(WIDTH)
    step = on_meta(model, *SHAPE)
    sampled = _sampled(model, step)
    operations, without = count_operations(sampled), count_operations(step)
    further = (operations - without) / LAYERS
    launched = Row("monitor, a sample's hooks, meta", operations, operations / without, further, asked="<= 12 a layer")
    held = {device: f"{_memory(device):.1f} times the largest activation" for device in ("meta", "cpu")}
    return [launched, *(Row(f"a sample's memory, {device}: {much}", asked="<= 2") for device, much in held.items())]


def rows_of_state_dicts(devices: list[str], rounds: int, repeat: int) -> list[Row]:
    """Return how long a `state_dict` takes with each average, relative to torch's layers, and with `torch.save`."""
    models = {TORCH: resnet50(WIDTH), AGAIN: resnet50(WIDTH)} | {n: converted(each) for n, each in AVERAGES.items()}
    for model in models.values():
        training_step(model, "cpu", torch.randn(SHAPE))()  # after which the histories lie side by side
    rows = []
    for what, take in {"state_dict": nn.Module.state_dict, "state_dict, saved": _save}.items():
        found = ratios({name: partial(take, model) for name, model in models.items()}, "cpu", rounds, repeat)
        rows += [Row(f"{what}: {n}", asked="<= 1.5", times={"cpu": found[n]}) for n in (AGAIN, *AVERAGES)]
    return rows


def _save(model: nn.Module) -> None:
    torch.save(model.state_dict(), BytesIO())


def _sampled(model: nn.Module, step: Step) -> Step:
    collector = LayerCollector(model, select_layers(model))

    def sampled() -> None:
        collector.attach()
        step()
        collector.detach()

    sampled()  # a first sample sets things up
    return sampled


def _memory(device: str) -> float:
    """Return how many times an activation a sample adds to the peak of a forward through two layers."""
    batch = torch.randn(8, 64, 32, 32, device=device)
    model = nn.Sequential(nn.BatchNorm2d(64), nn.ReLU()).to(device)

    def step() -> None:
        # Without a graph, so that what a hook holds for a moment adds to what the forward holds at that moment.
        with torch.no_grad():
            model(batch)

    return (peak_memory(_sampled(model, step)) - peak_memory(step)) / batch.nbytes


def print_table(rows: list[Row], device: str | None, card: str) -> None:
    counted = ("operations", "relative", "more a further layer", "Python calls", "bytecodes")
    print("| " + " | ".join(("what", *counted, "host-bound step", "asked", card)) + " |")
    print("|---|---:|---:|---:|---:|---:|---:|---|---:|")
    for row in rows:
        values = (
            *((row.operations, ".0f"), (row.relative, ".2f"), (row.further, ".1f")),
            *((row.calls, ",d"), (row.bytecodes, ",d"), (row.times.get("cpu"), ".3f")),
        )
        numbers = [_cell(*each) for each in values]
        there = "not measured" if device is None and row.times else _cell(row.times.get(device or ""), ".3f")
        print("| " + " | ".join((row.what, *numbers, row.asked, there)) + " |")
    print("\nMore a further layer: of an average, the operations of a further layer beyond those of torch's layer.")
    print("Of a callback, operations beyond those of the step without it, divided by the layers that it looks at:")
    print(f"{LAYERS} where the monitor looks at activations, else {NORMS} batch norms.")
    print("Python calls and bytecodes of a callback are those beyond the step without it.")
    print("The time of a state_dict is relative to that of torch's layers, in memory or with torch.save.")


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def accelerator() -> tuple[str | None, str]:
    """Return the accelerator's type and the name of the card; None where there is none."""
    if not torch.accelerator.is_available():
        return None, "host-bound step, accelerator"
    device = torch.accelerator.current_accelerator().type
    module = torch.get_device_module(device)
    return device, f"host-bound step, {module.get_device_name() if hasattr(module, 'get_device_name') else device}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--processes", type=int, default=5, help="each measures all, and medians are shown")
    parser.add_argument("--repeat", type=int, default=10, help="steps in a row, whose times are added up")
    parser.add_argument("--profile", action="store_true", help="show what an accelerator does in a step instead")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device, card = accelerator()
    if options.profile:
        with ExitStack() as stack:
            print("no accelerator" if device is None else f"{card}\n{profile_steps(trainers(stack, device))}")
        return
    devices = ["cpu"] if device is None else ["cpu", device]
    # Where its tensors happen to lie makes a model a few percent faster or slower for as long as a process lives.
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        tables = [
            pool.apply(measure, (options.tables, devices, options.rounds, options.repeat))
            for _ in range(options.processes)
        ]
    print_table([median_row(rows) for rows in zip(*tables, strict=True)], device, card)


def measure(tables: Sequence[str], devices: list[str], rounds: int, repeat: int) -> list[Row]:
    """Return some tables' rows, as one process measures them."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return [row for name in tables for row in TABLES[name](devices, rounds, repeat)]


TABLES: dict[str, Callable[[list[str], int, int], list[Row]]] = {
    "averages": rows_of_averages,
    "callbacks": rows_of_callbacks,
    "sample": lambda *_: rows_of_a_sample(),
    "state_dict": rows_of_state_dicts,
}


def median_row(rows: Sequence[Row]) -> Row:
    """Return a row of several tables with the medians of its times; what is counted is the same in all."""
    times = {device: statistics.median(row.times[device] for row in rows) for device in rows[0].times}
    return replace(rows[0], times=times)


if __name__ == "__main__":
    main()
