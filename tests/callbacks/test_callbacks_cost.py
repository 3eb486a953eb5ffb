"""What a callback has Python do at a step, counted as `benchmarks/host_cost.py` counts it, in a real Trainer."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
from host_cost import CALLBACKS, MODELS, PLAIN, SHAPE, python_beyond
from interpreted import count_python
from turns import trainer_step, training_step


def test_a_step_with_a_callback_runs_little_more_python() -> None:
    """Beside 52 batch norms each adds at most the 1,200 calls and 47,000 bytecodes that such a step may have in
    all (Python 3.11, torch 2.13; with others as many more as torch's own layers have)."""
    images = torch.randn(SHAPE)
    own = training_step(MODELS[PLAIN](), "cpu", images)
    own()
    allowed = [torchs * share for torchs, share in zip(count_python(own), (1200 / 1487, 47000 / 50642), strict=True)]
    with ExitStack() as stack:
        without = {name: stack.enter_context(trainer_step(make(), "cpu", images)) for name, make in MODELS.items()}
        for name, each in CALLBACKS.items():
            if name == "monitor, a sampled step":  # which reads the activations
                continue
            step = stack.enter_context(trainer_step(MODELS[each.without](), "cpu", images, each.callback()))
            for _ in range(30):  # the first batches set things up, and of young layers more is asked
                step()
                without[each.without]()
            calls, bytecodes = python_beyond(step, without[each.without])
            assert calls <= allowed[0], name
            assert bytecodes <= allowed[1], name
