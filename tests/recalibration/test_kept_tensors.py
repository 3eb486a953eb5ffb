"""Each kind of tensor, written in each way while it is kept, has its bits and its memory back afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_bn.recalibration import kept_tensors
from lightning_bn.recalibration.kept_objects import kept


@pytest.fixture(params=["lazy", "copied"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both ways to keep: the second is that of a torch without lazy copies."""
    if request.param == "copied":
        monkeypatch.setattr(kept_tensors, "lazy_copy", lambda tensor: None)
    return request.param


def with_grad() -> nn.Parameter:
    parameter = nn.Parameter(torch.randn(3, 4))
    parameter.grad = torch.randn(3, 4)
    return parameter


def in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.randn(3, 4)


KINDS: dict[str, Callable[[], Tensor]] = {
    "parameter": with_grad,
    "tensor": lambda: torch.randn(3, 4),
    "scalar": lambda: torch.tensor(2.0),
    "transposed": lambda: torch.randn(4, 3).t(),
    "part of a larger one": lambda: torch.randn(10, 4)[3:6],
    "channels last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "NaN and -0": lambda: torch.tensor([float("nan"), -0.0, 1.0]),
    "bfloat16": lambda: torch.randn(3, 4).bfloat16(),
    "int64": lambda: torch.arange(1, 7),
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "in shared memory": lambda: torch.randn(3, 4).share_memory_(),
    "numpy's": lambda: torch.from_numpy(np.arange(1.0, 5.0)),
    "made in inference mode": in_inference_mode,
}


def in_place(t: Tensor) -> None:
    t.mul_(3)


def through_data(t: Tensor) -> None:
    t.data.mul_(3)


def other_memory(t: Tensor) -> None:
    t.data = t.data * 3


def set_(t: Tensor) -> None:
    t.set_(torch.ones(5).to(t.dtype))


def into_numpys_view(t: Tensor) -> None:
    t.detach().view(torch.int16).numpy()[:] += 1


def foreach(t: Tensor) -> None:
    torch._foreach_mul_([t], 3)


def out(t: Tensor) -> None:
    torch.mul(t, 3, out=t)


def by_index(t: Tensor) -> None:
    t[...] = t * 3


def through_a_view(t: Tensor) -> None:
    t.view(-1)[0] = 7


def the_storage(t: Tensor) -> None:
    storage = t.untyped_storage()
    storage.copy_(torch.ones(storage.nbytes(), dtype=torch.uint8).untyped_storage())


def optimizer_of(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[Tensor], None]:
    def write(t: Tensor) -> None:
        t.grad = torch.ones_like(t)
        kind([t], lr=0.1, **options).step()

    write.__name__ = f"{kind.__name__} {options}"
    return write


WRITES: list[Callable[[Tensor], None]] = [
    *(
        in_place,
        through_data,
        other_memory,
        set_,
        into_numpys_view,
        foreach,
        out,
        by_index,
        through_a_view,
        the_storage,
    ),
    optimizer_of(torch.optim.Adam, fused=True),
    optimizer_of(torch.optim.Adam, foreach=True),
    optimizer_of(torch.optim.SGD, fused=True),
]


def bits(t: Tensor) -> bytes:
    return bytes(t.detach().clone().contiguous().reshape(-1).view(torch.uint8).tolist())


def picture(t: Tensor) -> tuple[Any, ...]:
    grad = t.grad if t.is_leaf else None
    lazy = torch._C._is_cow_tensor(t)  # before `data_ptr`, which ends it
    return (
        *(id(t), t.data_ptr(), t.untyped_storage().data_ptr(), t.shape, t.stride(), t.storage_offset(), t.dtype),
        *(t.requires_grad, id(grad), bits(t)),
        None if grad is None else (grad.data_ptr(), bits(grad)),
        lazy,
    )


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tensor_written_in_every_way(kind: str, write: Callable[[Tensor], None]) -> None:
    """Bit by bit, address by address; a view that was taken before has them too."""
    torch.manual_seed(0)
    tensor = KINDS[kind]()
    view = tensor.detach()
    before, old = picture(tensor), bits(view)
    written = False
    with torch.no_grad(), kept(box=[tensor]):
        try:
            write(tensor)
        except (RuntimeError, TypeError, ValueError):  # no such write into a tensor of this kind
            return
        finally:
            written = tensor.shape != view.shape or bits(tensor) != old
    assert written, "the oracle sees the write"
    assert picture(tensor) == before
    assert bits(view) == old
    assert view.data_ptr() == before[1]
    with torch.no_grad():
        tensor.add_(1) if not tensor.is_inference() else None
    assert tensor.data_ptr() == before[1], "nor does the next write move it"


@pytest.mark.parametrize("size", [0, 1])
def test_a_placeholder_that_is_resized(size: int) -> None:
    """As observers of a quantisation do in their first batch."""
    tensor = torch.full((size,), 2.0)
    with kept(box=[tensor]):
        tensor.resize_(8).fill_(3.0)
    assert tensor.tolist() == [2.0] * size


def test_tensors_over_one_storage_are_over_one_while_they_are_kept() -> None:
    """A parameter and its views are written together, and restored together; their gradients likewise."""
    flat = nn.Parameter(torch.arange(6.0))
    parts, box = [flat.data[:3], flat.data[3:].view(3, 1)], nn.Module()
    box.flat, box.parts = flat, parts
    before = [picture(t) for t in (flat, *parts)]
    with torch.no_grad(), kept(module=box) as tensors:
        parts[1].zero_()
        assert flat.tolist() == [0, 1, 2, 0, 0, 0]
        tensors.restore_parameters()
        assert flat.tolist() == [0, 1, 2, 3, 4, 5]
        flat[0] = 9
        assert parts[0].tolist() == [9, 1, 2]
    assert [picture(t) for t in (flat, *parts)] == before


def test_what_nobody_writes_takes_no_memory(way: str) -> None:
    """A forward of convolution, batch norm, attention and embedding copies no tensor of its model."""
    if way == "copied":
        pytest.skip("copies all")
    model = nn.ModuleList(
        [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.TransformerEncoderLayer(8, 2, 16), nn.Embedding(9, 8)]
    )
    model.eval()
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.data_ptr() for tensor in tensors]
    with torch.no_grad(), kept(model=model):
        model[1](model[0](torch.randn(2, 3, 8, 8)))
        model[2](model[3](torch.tensor([[1, 2, 3]])))
        # As torch._C._data_address: data_ptr() itself has a copy made.
        assert [torch._C._data_address(tensor) for tensor in tensors] == before
    assert [tensor.data_ptr() for tensor in tensors] == before


def test_an_array_of_the_models_own_over_a_parameter_is_seen() -> None:
    """numpy writes past torch; where the array is among the attributes, its memory is copied."""
    model = nn.Linear(2, 2)
    model.array = model.weight.detach().numpy()
    before = picture(model.weight)
    with kept(model=model) as tensors:
        model.array[:] = 7
        tensors.restore_parameters()
        assert bits(model.weight) == before[9]
    assert picture(model.weight) == before


def test_a_view_that_only_a_closure_holds_may_write() -> None:
    """The values are restored; the memory then is another."""
    model = nn.Linear(2, 2)
    view, old = model.weight.detach(), bits(model.weight)
    with kept(model=model):
        view.zero_()
    assert bits(model.weight) == bits(view) == old
    assert model.weight.data_ptr() == view.data_ptr()


def test_who_holds_a_tensor_of_the_pass_has_its_own(way: str) -> None:
    """What a forward gave away keeps the value that it had, and moves nothing later."""
    if way == "copied":
        pytest.skip("it is the model's own tensor")
    model = nn.Linear(2, 2)
    before = picture(model.weight)
    held = []
    with kept(model=model):
        held.append(model.weight.detach())
    assert picture(model.weight) == before
    with torch.no_grad():
        model.weight.zero_()
    assert model.weight.data_ptr() == before[1]
    assert bits(held[0]) == before[9]


def test_nested(way: str) -> None:
    """As a recalibration is within a fit: inner and outer each restore what was there when they began, and neither
    copies what nobody writes."""
    parameter, other = with_grad(), with_grad()
    before = picture(parameter), picture(other)
    with torch.no_grad(), kept(box=[parameter, other]):
        parameter.mul_(2)
        inner = bits(parameter)
        with kept(box=[parameter, other]):
            parameter.mul_(2)
        assert bits(parameter) == inner
        if way == "lazy":
            assert torch._C._data_address(other) == before[1][1]
    assert (picture(parameter), picture(other)) == before
