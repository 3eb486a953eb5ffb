"""docs/porting.md: the numbers of one layer in each framework's convention become torch's layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

PAGE = (Path(__file__).parent.parent.parent / "docs" / "porting.md").read_text()
CHANNELS, MOMENTUM, STEPS, EPS = 3, 0.1, 12, 1e-3

BIASED = ("Keras", "flax", "Equinox", "Haiku", "Paddle", "MXNet", "ONNX's operator")
WEIGHS_NEW = ("torch", "MLX", "tinygrad")
ALL = (*WEIGHS_NEW, *BIASED, "Chainer", "NNabla", "MindSpore")


def rows() -> dict[str, list[str]]:
    """The table of the page, a row for each framework in it."""
    lines = [
        line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| ") and "framework" not in line
    ]
    return {name.strip(): [cell.strip() for cell in cells] for names, *cells in lines for name in names.split(",")}


def ported(*args: Any, **kwargs: Any) -> nn.Module:
    namespace: dict[str, Any] = {}
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, namespace)
    return namespace["ported"](*args, **kwargs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("framework", ALL)
def test_a_layer_of_each_convention_becomes_torchs(framework: str) -> None:
    """Trained by a float64 loop in the framework's convention, it has torch's statistics, answers and next step."""
    variance, update, momentum, _ = rows()[framework]
    rng = np.random.default_rng(0)
    batches = rng.normal(1.0, 2.0, (STEPS, 8, CHANNELS, 4, 4))
    count = 8 * 4 * 4
    own = MOMENTUM if momentum == "m" else 1 - MOMENTUM  # what a user of it writes for the same average
    mean, var = np.zeros(CHANNELS), np.ones(CHANNELS)
    for batch in batches:
        new_mean = batch.mean((0, 2, 3))
        new_var = ((batch - new_mean[:, None, None]) ** 2).sum((0, 2, 3)) / (
            count if variance == "biased" else count - 1
        )
        old = own if update.startswith("`m * old") else 1 - own
        mean, var = old * mean + (1 - old) * new_mean, old * var + (1 - old) * new_var
    reference = nn.BatchNorm2d(CHANNELS, eps=EPS, momentum=MOMENTUM).double()
    for batch in batches:
        reference(torch.from_numpy(batch))
    # What a biased average began with (the 1) is weighed by n / (n - 1) too.
    start = (1 - MOMENTUM) ** STEPS * (count / (count - 1) - 1) if variance == "biased" else 0.0
    layer = ported(
        mean,
        var,
        np.ones(CHANNELS),
        np.zeros(CHANNELS),
        eps=EPS,
        momentum=own,
        weighs_old=momentum == "1 - m",
        biased_of=count if variance == "biased" else None,
    )
    assert layer.momentum == pytest.approx(MOMENTUM)
    assert layer.running_mean.numpy() == pytest.approx(reference.running_mean.numpy(), rel=1e-6)
    assert layer.running_var.numpy() - start == pytest.approx(reference.running_var.numpy(), rel=1e-6)
    image = torch.randn(2, CHANNELS, 4, 4)
    torch.testing.assert_close(layer(image), reference.eval()(image.double()).float(), rtol=1e-3, atol=1e-3)


def test_onnxruntime_keeps_to_its_row() -> None:
    """One training step of ONNX's operator: a biased variance, and a momentum that weighs the old value."""
    import onnxruntime
    from onnx import TensorProto, helper

    rng = np.random.default_rng(0)
    image = rng.normal(1.0, 2.0, (8, CHANNELS, 4, 4)).astype(np.float32)
    start = [rng.uniform(0.5, 2.0, CHANNELS).astype(np.float32) for _ in range(4)]
    names = ["x", "scale", "offset", "mean", "var"]
    node = helper.make_node(
        "BatchNormalization", names, ["y", "new_mean", "new_var"], training_mode=1, momentum=1 - MOMENTUM
    )
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 15)], ir_version=8
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    _, mean, var = session.run(None, dict(zip(names, [image, *start], strict=True)))
    assert rows()["ONNX's operator"][:2] == ["biased", "`m * old + (1 - m) * new`"]
    assert mean == pytest.approx((1 - MOMENTUM) * start[2] + MOMENTUM * image.mean((0, 2, 3)), rel=1e-4)
    assert var == pytest.approx((1 - MOMENTUM) * start[3] + MOMENTUM * image.var((0, 2, 3)), rel=1e-4)


def test_the_page_and_the_lists_above_agree() -> None:
    """A row that changes its convention must change here too."""
    table = rows()
    assert set(table) == set(ALL)
    assert {name for name, cells in table.items() if cells[0] == "biased"} == set(BIASED)
    assert {name for name, cells in table.items() if cells[2] == "m"} == set(WEIGHS_NEW)
