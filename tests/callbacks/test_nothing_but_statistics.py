"""A pass writes into whatever it likes, and all of it is put back to the bit: the statistics alone are new."""

from __future__ import annotations

import array
import copy
import itertools
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from states import as_bytes
from torch import Tensor, nn

from lightning_bn import recalibrate


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Everything(nn.Module):
    """Holds one of each kind of thing that a forward may write into."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.teacher = copy.deepcopy(self.linear).requires_grad_(False)
        self.last = nn.Linear(2, 2)
        self.register_buffer("queue", torch.zeros(4, 3))
        self.register_buffer("nothing", None)
        self.plain = torch.zeros(3)
        self.number = 0
        self.nested = {
            "a": [deque([1, 2], maxlen=2), {"b": torch.zeros(2)}],
            "s": {1, 2},
            "d": defaultdict(list, x=[1]),
        }
        self.ordered = OrderedDict(one=1, two=2)
        self.space = SimpleNamespace(inner=SimpleNamespace(values=[1, 2]))
        self.array = np.zeros(3)
        self.metric = torchmetrics.MeanMetric()
        self.listed = torchmetrics.CatMetric()
        self.generators = [torch.Generator(), random.Random(0), np.random.default_rng(0)]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def in_place(m: Everything) -> None:
    m.linear.weight.mul_(1.5)


def through_data(m: Everything) -> None:
    m.teacher.weight.data.mul_(0.9).add_(m.linear.weight.data, alpha=0.1)


def other_storage(m: Everything) -> None:
    m.teacher.weight.data = m.teacher.weight.data * 0.9


def sign_of_zero(m: Everything) -> None:
    m.plain.neg_()


def other_parameter(m: Everything) -> None:
    m.last.weight = nn.Parameter(torch.ones(2, 2))
    del m.last.bias


def requires_grad(m: Everything) -> None:
    m.requires_grad_(False)
    m.teacher.requires_grad_(True)


def gradients(m: Everything) -> None:
    m.linear.weight.grad.add_(1)
    m.linear.bias.grad = None
    with torch.enable_grad():
        m.last(torch.ones(2)).sum().backward()


def buffers(m: Everything) -> None:
    m.queue[0] = 1
    m.nothing = torch.ones(1)
    m.register_buffer("new", torch.ones(2), persistent=False)


def modules(m: Everything) -> None:
    m.extra = nn.Linear(1, 1)
    m.last = nn.Identity()


def attributes(m: Everything) -> None:
    m.number += 1
    m.fresh = [1]
    m.plain = m.plain + 1


def containers(m: Everything) -> None:
    m.nested["a"][0].append(3)
    m.nested["a"][1]["b"].add_(1)
    m.nested["s"].add(3)
    m.nested["d"]["y"].append(1)
    m.nested["new"] = 1
    m.ordered.move_to_end("one")
    m.space.inner.values.insert(0, 9)
    m.array += 1


def metrics(m: Everything) -> None:
    m.metric(torch.rand(3))
    m.listed.update(torch.rand(2))


def random_numbers(m: Everything) -> None:
    torch.rand(1, generator=m.generators[0])
    m.generators[1].random()
    m.generators[2].random()


def hooks_and_modes(m: Everything) -> None:
    m.train()
    m.linear.register_forward_hook(lambda *_: None)
    m.norm.momentum = 0.7


def kernel(m: Everything) -> None:
    """Batch norm's kernel does not count its writes into buffers."""
    F.batch_norm(torch.randn(8, 3) + 3, m.plain, m.queue[1], None, None, True, 0.5)


WRITES = [
    *(in_place, through_data, other_storage, sign_of_zero, other_parameter, requires_grad, gradients, buffers, modules),
    *(attributes, containers, metrics, random_numbers, hooks_and_modes, kernel),
]


def picture(thing: Any, seen: dict[int, int] | None = None) -> Any:
    """All that hangs in `thing`, by value and by identity, as something that can be compared; a walk of its own."""
    seen = {} if seen is None else seen
    if isinstance(thing, (int, float, str, bytes, type(None), torch.device, torch.dtype, type)) or callable(
        getattr(thing, "__code__", None)
    ):
        return repr(thing)
    if id(thing) in seen:
        return ("again", id(thing))
    seen[id(thing)] = 1
    if isinstance(thing, Tensor):
        grad = picture(thing.grad, seen) if thing.is_leaf else None
        return (id(thing), thing.data_ptr(), thing.requires_grad, as_bytes(thing), grad)
    if isinstance(thing, dict):
        return (id(thing), [(str(key), picture(value, seen)) for key, value in thing.items()])
    if isinstance(thing, (list, tuple, deque, set)):
        return (id(thing), [picture(value, seen) for value in thing])
    if isinstance(thing, np.ndarray):
        return (id(thing), bytes(thing))
    if isinstance(thing, torch.Generator):
        return as_bytes(thing.get_state())
    if isinstance(thing, random.Random):
        return thing.getstate()
    if isinstance(thing, np.random.Generator):
        return str(thing.bit_generator.state)
    members = [(name, picture(value, seen)) for name, value in getattr(thing, "__dict__", {}).items()]
    return (id(thing), type(thing).__name__, members)


def model() -> Everything:
    torch.manual_seed(0)
    made = Everything()
    made(torch.randn(5, 3)).sum().backward()
    made.zero_grad(set_to_none=False)
    return made


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_whatever_a_pass_writes_is_put_back(write: Callable[[Everything], None], exact: bool) -> None:
    """By value, to the bit, and by identity: who holds a list of the model's holds it afterwards too."""
    one = model()
    batches = list(torch.randn(3, 8, 3))
    before = picture(one)
    spoiled = model()
    write_alone = picture(spoiled)
    with torch.no_grad():
        write(spoiled)
    assert picture(spoiled) != write_alone, "the oracle sees the write"

    first = iter([True])

    def forward(module: Everything, batch: Tensor) -> None:
        module(batch)
        if next(first, False):
            write(module)

    report = recalibrate(one, batches, forward=forward, exact=exact, progress=False, layers="all")
    assert report.layers[0].samples == 24
    report.rollback()
    assert picture(one) == before


def test_statistics_are_those_of_the_weights_as_they_are() -> None:
    """Weights that a batch moves, seen by a version counter or not, are put back before the next one."""
    for write in (in_place, through_data, other_storage):
        one, other = model(), model()
        one.teacher.weight, other.teacher.weight = one.linear.weight, other.linear.weight
        batches = list(torch.randn(4, 8, 3))

        def forward(module: Everything, batch: Tensor, write: Callable[[Everything], None] = write) -> None:
            module(batch)
            write(module)

        recalibrate(one, batches, forward=forward, progress=False)
        recalibrate(other, batches, progress=False)
        assert torch.equal(one.norm.running_mean, other.norm.running_mean), write.__name__


def test_a_moment_of_the_model_that_others_hold_is_put_back_in_place() -> None:
    """A list that the caller holds too."""
    one = model()
    held = one.nested["a"][1]["b"]
    one.linear.register_forward_hook(lambda *_: [held.add_(1)].clear())
    recalibrate(one, [torch.randn(8, 3)], progress=False)
    assert held.tolist() == [0, 0]


def test_what_is_no_object_of_python_is_left_alone() -> None:
    """Iterators, an array of Python's, attributes in slots: what the forward does to them stays, and nothing is
    refused."""
    one = model()
    one.steps, one.rows, one.seen = itertools.count(), (x for x in range(3)), array.array("d", [1.0])
    one.slotted = Slotted()

    def forward(module: Everything, batch: Tensor) -> None:
        module(batch)
        next(module.steps), next(module.rows)
        module.seen.append(2.0)
        module.slotted.count += 1

    recalibrate(one, [torch.randn(8, 3)] * 2, forward=forward, progress=False)
    assert (next(one.steps), next(one.rows), one.seen.tolist()) == (2, 2, [1.0, 2.0, 2.0])
    assert one.slotted.count == 2


def test_what_threads_share_is_left_alone() -> None:
    """A queue, or anything that holds a lock: what is in it may be another's doing."""
    import queue
    import threading

    one = model()
    one.queue_of_work = queue.Queue()
    one.service = SimpleNamespace(lock=threading.Lock(), done=[])
    recalibrate(
        one,
        [torch.randn(8, 3)],
        forward=lambda m, x: (m(x), m.queue_of_work.put(1), m.service.done.append(1)),
        progress=False,
    )
    assert (one.queue_of_work.qsize(), one.service.done) == (1, [1])
