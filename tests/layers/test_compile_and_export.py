"""The layers go through torch.compile whole, and the eval model through torch.export and ONNX."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_bn import Averaging, BatchNorm2d, Cumulative, Exponential, Window, convert_batch_norm

AVERAGES = [
    None,
    Exponential(0.1, debias=True),
    Exponential(0.1, pooled=True),
    Window(3),
    Window(4, pooled=True),
    Cumulative(),
    Cumulative(pooled=True),
]
each_average = pytest.mark.parametrize("averaging", AVERAGES, ids=str)


@each_average
def test_one_graph_that_is_never_compiled_again(averaging: Averaging | None) -> None:
    """fullgraph=True in training and eval, one compilation each for many steps, and eager's numbers."""
    eager = nn.Sequential(nn.Conv2d(2, 3, 1), BatchNorm2d(3, averaging=averaging), nn.ReLU())
    compiled_model = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(compiled_model, fullgraph=True, backend=counter)
    for training, graphs in ((True, 1), (False, 2)):
        eager.train(training), compiled_model.train(training)
        for step in range(8):
            batch = torch.randn(4, 2, 3, 3)
            if step == 4:
                batch[0, 0, 0, 0] = float("nan")
            torch.testing.assert_close(compiled(batch), eager(batch), equal_nan=True)
            for key, value in eager.state_dict().items():
                torch.testing.assert_close(compiled_model.state_dict()[key], value, rtol=1e-5, atol=1e-6)
        assert counter.frame_count == graphs


@pytest.mark.parametrize("averaging", [None, Window(4, pooled=True)], ids=str)
def test_masked_input_in_one_graph(averaging: Averaging | None) -> None:
    """A mask whose valid positions change from step to step neither breaks the graph nor compiles it again."""
    eager = BatchNorm2d(3, averaging=averaging)
    twin = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for _ in range(5):
        batch, mask = torch.randn(4, 3, 2, 2), torch.rand(4, 2, 2) > 0.3
        torch.testing.assert_close(compiled(batch, mask), eager(batch, mask))
        torch.testing.assert_close(twin.running_var, eager.running_var)
    assert counter.frame_count == 1


def test_inductor() -> None:
    """The default backend trains a windowed layer with the numbers of eager, gradients included."""
    eager = nn.Sequential(nn.Conv2d(2, 3, 1), BatchNorm2d(3, averaging=Window(3)))
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True)
    for _ in range(5):
        batch = torch.randn(4, 2, 3, 3)
        for model in (eager, compiled):
            model(batch).square().sum().backward()
    for one, other in zip(eager.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(twin[1].running_var, eager[1].running_var)


def eval_model(averaging: Averaging | None) -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), BatchNorm2d(3, averaging=averaging), nn.ReLU())
    for _ in range(4):
        model(torch.randn(4, 2, 5, 5) * 3)
    return model.eval(), torch.randn(2, 2, 5, 5)


@each_average
def test_torch_export(averaging: Averaging | None) -> None:
    """The exported program computes what the model does."""
    model, batch = eval_model(averaging)
    exported = torch.export.export(model, (batch,)).module()
    torch.testing.assert_close(exported(batch), model(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("averaging", [None, Window(3)], ids=str)
def test_onnx(averaging: Averaging | None, tmp_path: Path) -> None:
    """The dynamo exporter's ONNX file gives the same outputs to 1e-5 in onnxruntime."""
    model, batch = eval_model(averaging)
    torch.onnx.export(model, (batch,), str(tmp_path / "model.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    np.testing.assert_allclose(output, model(batch).detach().numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("averaging", "limit"), [(Window(20), 330), (Window(20, pooled=True), 600)], ids=["window", "pooled window"]
)
def test_operations_of_a_compiled_window(averaging: Averaging, limit: int) -> None:
    """The graph of eight layers between convolutions and ReLUs calls a limited number of functions, where torch's
    layers call 24."""
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(8)]
    found: list[int] = []

    def count(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        found.append(sum(node.op == "call_function" for node in module.graph.nodes))
        return module.forward

    torch.compile(convert_batch_norm(nn.Sequential(*layers), averaging), fullgraph=True, backend=count)(
        torch.randn(2, 8, 20, 20)
    )
    assert len(found) == 1
    assert found[0] <= limit


@each_average
def test_compiled_statistics_are_eagers_to_the_bit(averaging: Averaging | None) -> None:
    """Where the graph runs operation by operation, as it was traced: the same sums in the same order."""
    eager = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    convert_batch_norm(eager, averaging)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for step in range(9):
        batch = torch.randn(4, 3, 2, 2) + step
        if step == 5:
            batch[0, 0] = float("nan")
        compiled(batch), eager(batch)
        for key, value in eager.state_dict().items():
            assert torch.equal(twin.state_dict()[key].nan_to_num(-7), value.nan_to_num(-7)), key


class Fused(nn.BatchNorm2d):
    """Another package's layer, which keeps its own forward."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Fused])
@each_average
def test_trace(averaging: Averaging | None, norm: type[nn.BatchNorm2d]) -> None:
    """torch.jit.trace, with its own check of a second trace; the program reads the layer's buffers."""
    model = convert_batch_norm(nn.Sequential(nn.Conv2d(2, 3, 1), norm(3)), averaging)
    model(torch.randn(4, 2, 5, 5) * 3)
    batch = torch.randn(2, 2, 5, 5)
    traced = torch.jit.trace(model.eval(), batch)
    assert torch.equal(traced(batch), model(batch))
    model[1].running_mean.add_(1)
    assert torch.equal(traced(batch), model(batch))
