"""The layers: drop-ins for torch's where no averaging is given, and safe against bad batches, masks and repeated
forwards."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import module_db

from lightning_bn import Averaging, BatchNorm1d, BatchNorm2d, BatchNorm3d, Cumulative, Exponential, Window

PAIRS = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}
AVERAGES = [
    None,
    Exponential(0.1),
    Exponential(0.2, debias=True),
    Exponential(0.1, pooled=True),
    Window(4),
    Window(5, pooled=True),
    Cumulative(),
]
each_average = pytest.mark.parametrize("averaging", AVERAGES, ids=str)

TAKES_BIAS = "bias" in inspect.signature(nn.BatchNorm1d).parameters


def torch_inputs(dtype: torch.dtype, training: bool) -> Iterator[tuple[type[nn.Module], tuple, dict, Tensor]]:
    """Yield the constructor arguments and forward inputs with which torch tests its own layers."""
    for info in module_db:
        if info.module_cls in PAIRS:
            for given in info.module_inputs_func(
                info, device="cpu", dtype=dtype, requires_grad=False, training=training
            ):
                yield (
                    info.module_cls,
                    given.constructor_input.args,
                    given.constructor_input.kwargs,
                    given.forward_input.args[0],
                )


def pair(cls: type[nn.Module], *args: object, **kwargs: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    theirs = cls(*args, **kwargs)
    ours = PAIRS[cls](*args, **kwargs)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def run(layer: nn.Module, batch: Tensor) -> list[Tensor]:
    """Return output, gradients of input, weight and bias, and a gradient of the gradient."""
    batch = batch.detach().clone().requires_grad_()
    output = layer(batch)
    (first,) = torch.autograd.grad(output.square().sum(), batch, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), [batch, *layer.parameters()])
    return [output, first, *second, *torch.autograd.grad(layer(batch).sin().sum(), [batch, *layer.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_torchs_own_inputs_to_the_bit(dtype: torch.dtype, training: bool) -> None:
    """Outputs, all gradients, double backward and buffers equal torch's to the bit on the inputs torch tests itself
    with."""
    seen = 0
    for cls, args, kwargs, batch in torch_inputs(dtype, training):
        theirs, ours = pair(cls, *args, **kwargs, dtype=dtype)
        for layer in (theirs, ours):
            layer.train(training)
        cumulative = theirs.momentum is None and training
        for one, other in zip(run(theirs, batch), run(ours, batch), strict=True):
            assert torch.equal(one, other), (cls, args, kwargs)
        for key, value in theirs.state_dict().items():
            if cumulative and key.startswith("running"):  # torch asks the host for 1/t and rounds once less
                torch.testing.assert_close(ours.state_dict()[key], value)
            else:
                assert torch.equal(ours.state_dict()[key], value), key
        seen += 1
    assert seen >= 12


def test_parity_goes_red() -> None:
    """The comparison sees another momentum, by the buffers."""
    theirs, ours = nn.BatchNorm1d(3), BatchNorm1d(3, momentum=0.11)
    batch = torch.randn(8, 3)
    theirs(batch), ours(batch)
    assert not torch.equal(theirs.running_mean, ours.running_mean)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"affine": False},
        pytest.param({"bias": False}, marks=pytest.mark.skipif(not TAKES_BIAS, reason="torch before 2.13")),
        {"track_running_stats": False},
        {"eps": 1e-3, "dtype": torch.float64},
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", list(PAIRS))
def test_drop_in(cls: type[nn.Module], options: dict[str, object]) -> None:
    """State dict keys, repr, isinstance, training over several steps, eval and reset are torch's."""
    theirs, ours = pair(cls, 3, **options)
    shape = (5, 3, *[2] * {nn.BatchNorm1d: 0, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[cls])
    assert isinstance(ours, cls)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mode in (True, True, False, True):
        batch = torch.randn(shape, dtype=theirs.weight.dtype if theirs.weight is not None else None)
        assert torch.equal(theirs.train(mode)(batch), ours.train(mode)(batch)) or not mode
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-6, atol=1e-7)
    theirs.reset_running_stats(), ours.reset_running_stats()
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)


def test_channels_last(device: torch.device) -> None:
    """The memory format goes through, and numbers are torch's to the bit."""
    theirs, ours = (cls(8).to(device) for cls in (nn.BatchNorm2d, BatchNorm2d))
    batch = torch.randn(4, 8, 6, 6, device=device).to(memory_format=torch.channels_last)
    one, other = theirs(batch), ours(batch)
    assert torch.equal(one, other)
    assert other.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(theirs.running_var, ours.running_var)


def test_empty_batch() -> None:
    """A batch of no samples comes out empty, as torch's does, and no average takes it for data."""
    batch = torch.empty(0, 3, 2, 2)
    theirs, ours = nn.BatchNorm2d(3), BatchNorm2d(3)
    assert theirs(batch).shape == ours(batch).shape
    assert all(torch.equal(a, b) for a, b in zip(theirs.buffers(), ours.buffers(), strict=True))
    for averaging in AVERAGES[2:]:
        layer = BatchNorm2d(3, averaging=averaging)
        layer(torch.randn(4, 3, 2, 2))
        before = copy.deepcopy(layer.state_dict())
        layer(batch)
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    for layer in (BatchNorm2d(3), BatchNorm2d(3, averaging=Exponential(0.1)), nn.BatchNorm2d(3)):
        layer(torch.randn(4, 3, 2, 2))
        mean = layer.running_mean.clone()
        layer(batch)
        assert layer.num_batches_tracked == 2  # torch's kernel computes these, and torch counts it
        assert torch.equal(layer.running_mean, mean)


@pytest.mark.parametrize("value", [0.01, 1.0, None])
def test_momentum_stays_assignable(value: float | None) -> None:
    """Third parties set bn.momentum; it acts as on torch's layer, also where an Exponential is the averaging."""
    theirs, ours, averaged = nn.BatchNorm1d(3), BatchNorm1d(3), BatchNorm1d(3, averaging=Exponential(0.5))
    for layer in (theirs, ours, averaged):
        layer.momentum = value
    for _ in range(3):
        batch = torch.randn(6, 3)
        theirs(batch), ours(batch), averaged(batch)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-6, atol=1e-7)
    assert ours.momentum == averaged.momentum == averaged.averaging.momentum == value
    torch.testing.assert_close(averaged.running_mean, theirs.running_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(averaged.running_var, theirs.running_var, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "averaging", [Exponential(0.1), Exponential(0.1, debias=True), Exponential(0.1, pooled=True)], ids=str
)
def test_update_bn_serves_an_exponential(averaging: Averaging) -> None:
    """torch's update_bn, which sets momentum None for its pass, leaves the average over its batches, and the momentum
    as it was."""
    layer = BatchNorm1d(3, averaging=averaging)
    batches = [torch.randn(8, 3) + 5 for _ in range(5)]
    torch.optim.swa_utils.update_bn(batches, layer)
    torch.testing.assert_close(layer.running_mean, torch.stack([batch.mean(0) for batch in batches]).mean(0))
    assert layer.momentum == layer.averaging.momentum == 0.1


@each_average
def test_nonfinite_batches_leave_no_trace(averaging: Averaging | None, device: torch.device) -> None:
    """Ten bad batches among a hundred leave the same state, to the bit and at every step, as the ninety good ones."""
    clean, dirty = (BatchNorm2d(3, averaging=averaging, device=device) for _ in range(2))
    for t in range(100):
        batch = torch.randn(4, 3, 2, 2, device=device) + t % 7
        if t % 10 == 3:
            bad = batch.clone()
            bad[t % 4, t % 3, 0, 1] = (float("nan"), float("inf"), -float("inf"))[t % 3]
            dirty(bad)
        else:
            clean(batch)
            dirty(batch)
        # At every step: what a window has taken in wrongly leaves it again.
        for key, value in clean.state_dict().items():
            assert torch.equal(dirty.state_dict()[key], value), (t, key)
    assert dirty.num_batches_tracked == 90


def test_nonfinite_batches_can_be_let_in() -> None:
    """With skip_nonfinite=False the layer does as torch's."""
    theirs, ours = nn.BatchNorm1d(2), BatchNorm1d(2, skip_nonfinite=False)
    batch = torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
    theirs(batch), ours(batch)
    assert torch.equal(theirs.running_mean.isnan(), ours.running_mean.isnan())
    assert ours.num_batches_tracked == 1
    assert "skip_nonfinite=False" in repr(ours)


@each_average
def test_eval_backward_survives_a_training_batch(averaging: Averaging | None) -> None:
    """The gradient of an eval forward is that of its own statistics, though a training batch writes the buffers before
    backward."""
    layer = BatchNorm1d(3, averaging=averaging)
    layer(torch.randn(8, 3))
    batch = torch.randn(4, 3, requires_grad=True)
    expected = torch.autograd.grad(layer.eval()(batch).square().sum(), [batch, layer.weight])
    loss = layer(batch).square().sum()
    layer.train()(torch.randn(8, 3) * 5)
    for one, other in zip(torch.autograd.grad(loss, [batch, layer.weight]), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)])
def test_one_value_per_channel(shape: tuple[int, ...]) -> None:
    """One value has no variance: torch's error, with what to do, and nothing counted."""
    layer = BatchNorm1d(3, averaging=Window(3))
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training.*drop_last=True"):
        layer(torch.randn(shape))
    assert layer.num_batches_tracked == 0
    layer.eval()(torch.randn(shape))


@pytest.mark.parametrize(
    ("cls", "shape"), [(BatchNorm1d, (2, 3, 4, 4)), (BatchNorm2d, (2, 3)), (BatchNorm3d, (2, 3, 4, 4))]
)
def test_wrong_number_of_dimensions(cls: type[nn.Module], shape: tuple[int, ...]) -> None:
    """The error is torch's own."""
    (theirs,) = (base for base in PAIRS if PAIRS[base] is cls)
    with pytest.raises(ValueError, match=r"expected .* input") as expected:
        theirs(3)(torch.randn(shape))
    with pytest.raises(ValueError, match=r"expected .* input") as error:
        cls(3)(torch.randn(shape))
    assert str(error.value) == str(expected.value)


def test_averaging_must_be_one() -> None:
    """A number where an average belongs, or an average with nothing to keep, raises with the call to make."""
    with pytest.raises(TypeError, match=r"BatchNorm2d\(8, averaging=20\): .*Window\(20\)"):
        BatchNorm2d(8, averaging=20)
    with pytest.raises(ValueError, match="no running statistics to average"):
        BatchNorm2d(8, track_running_stats=False, averaging=Window(3))


def test_each_layer_keeps_its_own_copy() -> None:
    """One object configures many layers, and none of them writes into it or into another's."""
    averaging = Window(3)
    one, other = (BatchNorm1d(2, averaging=averaging) for _ in range(2))
    one(torch.randn(4, 2))
    assert one.averaging is not averaging
    assert (other.averaging.cursor == 0).all()
    assert (one.averaging.cursor == 1).all()
