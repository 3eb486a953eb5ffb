"""Where this package touches parts of torch that are not public; what it asks of storages, for recalibrations alone, is
in `lightning_bn.recalibration.storages`, and of TorchScript, for observers alone, in `lightning_bn.torchscript`.

Each function says why nothing public will do, and what it answers where the private part is gone.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter, itemgetter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

_call_code = getattr(getattr(nn.Module, "_call_impl", None), "__code__", None)
_is_exporting = getattr(torch.compiler, "is_exporting", None)
_update_stats = getattr(torch, "batch_norm_update_stats", None)
_group_norm = getattr(torch, "native_group_norm", None)
_saved_tensors_hooks = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)
_foreach_copy = getattr(torch, "_foreach_copy_", None)
_foreach_add = getattr(torch, "_foreach_add_", None)
_functorch = getattr(torch._C, "_functorch", None)
_are_batched: list[Callable[[Tensor], bool]] = [
    asks for name in ("is_batchedtensor", "is_legacy_batchedtensor") if (asks := getattr(_functorch, name, None))
]
_unwrapped_once: Any = getattr(_functorch, "get_unwrapped", None)
_is_wrapped = getattr(_functorch, "is_functorch_wrapped_tensor", None) if _unwrapped_once is not None else None
_is_wrapped_by_transform: Callable[[Tensor], bool] = _is_wrapped or (lambda tensor: False)
_is_wrapper = getattr(getattr(torch.utils, "_python_dispatch", None), "is_traceable_wrapper_subclass", None)
_flatten_dense_tensors = getattr(torch._utils, "_flatten_dense_tensors", None)
_DisableTorchFunction = getattr(torch._C, "DisableTorchFunction", nullcontext)

# Called by every layer in every forward, and so without a Python function around them. What they tell, and what the
# answer is where they are gone: `in_backward`, `in_transform`, the `TorchFunctionMode` entered last (None is none), and
# ``torch.backends.cudnn.enabled``.
backward_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", None) or (lambda: -1)
innermost_transform: Callable[[], object] = getattr(_functorch, "peek_interpreter_stack", None) or (lambda: None)
innermost_mode: Callable[[], object] = getattr(torch.overrides, "_get_current_function_mode", None) or (lambda: None)
cudnn_enabled: Callable[[], bool] = getattr(torch._C, "_get_cudnn_enabled", None) or (
    lambda: bool(torch.backends.cudnn.enabled)
)

# A module's own buffers and parameters by name; not to be changed. `Module.__getattr__`, which finds them in public,
# takes twenty times as long, for each layer at each step. Where the dicts are gone, the public way it is.
_of_module = vars(nn.Module())
buffers_of: Callable[[nn.Module], dict[str, Tensor | None]] = (
    attrgetter("_buffers") if "_buffers" in _of_module else lambda module: dict(module.named_buffers(recurse=False))
)
parameters_of: Callable[[nn.Module], dict[str, nn.Parameter | None]] = (
    attrgetter("_parameters")
    if "_parameters" in _of_module
    else lambda module: dict(module.named_parameters(recurse=False))
)
children_of: Callable[[nn.Module], dict[str, nn.Module | None]] = (
    attrgetter("_modules") if "_modules" in _of_module else lambda module: dict(module.named_children())
)


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Return ``dict(model.named_modules(remove_duplicate=False))`` in a fifth of the time: torch's generators hand each
    module through all levels above it.

    Example:
        >>> modules_by_path(nn.Sequential(nn.ReLU()))["0"]
        ReLU()
    """
    found = {"": model}

    def visit(prefix: str, children: dict[str, nn.Module | None]) -> None:
        for name, child in children.items():
            if child is not None:
                found[prefix + name] = child
                if below := children_of(child):
                    visit(f"{prefix}{name}.", below)

    visit("", children_of(model))
    return found


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Return ``list(model.modules())``; see `modules_by_path`."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        if (module := waiting.pop()) is not None and module not in found:
            found[module] = None
            waiting += reversed([*children_of(module).values()])
    return list(found)


def all_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return ``list(model.parameters())``; see `modules_by_path`."""
    every = [each for module in all_modules(model) for each in parameters_of(module).values() if each is not None]
    return list({id(each): each for each in every}.values())


def buffer_of_each(modules: Iterable[nn.Module], name: str) -> list[Tensor]:
    """Return the buffer `name` of each of the modules, which all have it, in a loop that runs no Python for each."""
    return list(map(itemgetter(name), map(buffers_of, modules)))


def affine(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return the weight and the bias that a forward of the batch norm `layer` uses now, (C,) each, or None.

    They are read as attributes: a pruned weight is a plain tensor that a hook computes before each forward, a
    parametrized one a property, one that another network makes any tensor. A weight that is a parameter, as most are,
    is found sooner in the dict of these.
    """
    parameters = layer.__dict__.get("_parameters", {})  # not `parameters_of`, which torch.compile can't follow
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return layer.weight, layer.bias  # type: ignore[return-value]  # for torch any attribute may be a module


def module_in_forward() -> nn.Module | None:
    """Return the innermost module whose forward is being executed; None: there is none, or hooks on it are.

    Hooks tell of the modules that have them alone, and hooks on every module cost at each of their calls. Without the
    private method the answer is None.
    """
    frame = sys._getframe(1) if _call_code is not None else None
    while frame is not None:
        if frame.f_code is _call_code:
            found = frame.f_locals
            module = found.get("self")
            # It has a result as soon as the forward has returned.
            return module if isinstance(module, nn.Module) and found.get("result") is None else None
        frame = frame.f_back
    return None


def unseen_by_modes() -> AbstractContextManager[object]:
    """Return a context in which no `TorchFunctionMode`, nor any tensor subclass, sees what a hook reads: a mode takes
    microseconds for each attribute. Nothing public turns modes off; without the class, hooks are slower."""
    found: AbstractContextManager[object] = _DisableTorchFunction()
    return found


def in_backward() -> bool:
    """Tell whether this code runs inside a backward pass.

    A forward inside backward is the recomputation of activation checkpointing. Nothing public says so: the first pass
    of reentrant checkpointing runs under ``no_grad`` and the recomputation does not, so the grad mode points at the
    wrong one of the two. Without the private function (or while compiling, where torch handles recomputation itself)
    the answer is False, and a checkpointed layer counts its batches twice, as torch's own does.
    """
    return not torch.compiler.is_compiling() and backward_task() != -1


def in_transform() -> bool:
    """Tell whether this code runs inside a transform of ``torch.func`` (grad, vmap, jvp), whose tensors are worth
    nothing after it and which may not write others.

    Nothing public says so; where the function is gone the answer is False, and such a forward raises.
    """
    return not torch.compiler.is_compiling() and innermost_transform() is not None


def is_exporting() -> bool:
    """Tell whether a program is being made of this code that runs without it: ``torch.export``, ``torch.onnx``.

    ``torch.compiler.is_exporting`` is public since 2.7; before, the answer is False.
    """
    return torch.compiler.is_compiling() and _is_exporting is not None and bool(_is_exporting())


def is_tracing() -> bool:
    """Tell whether ``torch.jit.trace`` records this code, or what stands on it: the older ONNX exporter, OpenVINO."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def is_replica(module: nn.Module) -> bool:
    """Tell whether `DataParallel` has made `module` for one forward: a copy around the original's hooks and state.

    Only a mark that torch sets says so; where it is gone the answer is False, and the hooks of the original act on the
    original.
    """
    return bool(module.__dict__.get("_is_replica", False))  # `getattr` asks parameters, buffers and modules too


def is_wrapper(tensor: Tensor) -> bool:
    """Tell whether a tensor holds others in place of values, as a DTensor does.

    Nothing public says so; where the function is gone the answer is False, and reading such a tensor fails by itself.
    """
    return _is_wrapper is not None and bool(_is_wrapper(tensor))


def is_batched(tensor: Tensor) -> bool:
    """Tell whether a tensor stands for many, one for each entry that ``torch.vmap`` or ``is_grads_batched=True`` runs
    over: its values can't be asked for.

    Nothing public says so; where the functions are gone the answer is False, and reading such a tensor fails by itself.
    """
    for asks in _are_batched:  # no generator, since every layer in every sample asks this
        if asks(tensor):
            return True
    return _is_wrapped_by_transform(tensor) and is_batched(_unwrapped_once(tensor))


def is_compiled(module: nn.Module) -> bool:
    """Tell whether `module` or one below it was given to ``torch.compile``, or compiled in place: torch has no public
    question for either; where its marks are gone, the answer is False."""
    return any(map(compiled_methods, all_modules(module)))


def compiled_methods(module: nn.Module) -> dict[str, Any]:
    """Return by name what compiled code stands in the place of, in the attributes of `module`: its forward or call, or
    any method, as in the module of ``trainer.fit(torch.compile(module))``; see `is_compiled`."""
    if FunctionType not in set(map(type, vars(module).values())):  # most have none
        return {}
    functions = ((name, value) for name, value in vars(module).items() if type(value) is FunctionType)
    return {n: each._torchdynamo_orig_callable for n, each in functions if hasattr(each, "_torchdynamo_orig_callable")}


def kernel_moments(data: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the *biased* variance of `data`, (N, C, *spatial), per channel, by batch norm's own kernel.

    `torch.batch_norm_update_stats` is there and undocumented; it takes a third to a tenth of the time of
    `torch.var_mean` over the same dimensions. Where it is gone, or a device has none, `torch.var_mean` does it.

    Returns:
        Two tensors of shape (C,), in float32 (float64 for float64 data).
    """
    dtype = data.dtype if data.dtype in (torch.float32, torch.float64) else torch.float32
    if _update_stats is not None:
        # Without running statistics the kernel gives 16-bit moments for 16-bit data; beside float32 ones it gives
        # float32.
        scratch = None if data.dtype == dtype else torch.zeros(data.shape[1], dtype=dtype, device=data.device)
        try:
            mean, var = _update_stats(data, scratch, None if scratch is None else scratch.clone(), 1.0)
            return mean, var
        except NotImplementedError:
            pass
    over = [dim for dim in range(data.dim()) if dim != 1]
    var, mean = torch.var_mean(data.to(dtype), over, unbiased=False)
    return mean, var


def image_moments(data: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the *biased* variance of each channel of each image of contiguous float32 or float64 `data`,
    (N, C, *spatial).

    `torch.native_group_norm` with a group for each channel returns them (as 1 / sqrt(variance + 0)) beside its output.
    It is there and undocumented; on the CPU it takes a fifth to a tenth of the time of `torch.var_mean`, which does it
    where the function is gone.

    Returns:
        Two tensors of shape (N, C).
    """
    samples, channels = data.shape[:2]
    if _group_norm is None:
        var, mean = torch.var_mean(data.flatten(2), 2, unbiased=False)
        return mean, var
    _, mean, inverse = _group_norm(
        data, None, None, samples, channels, data.numel() // (samples * channels), channels, 0.0
    )
    return mean, inverse.double().pow(-2)


def copy_each(targets: list[Tensor], values: list[Tensor]) -> None:
    """Write each of `values` into its target, in place, as one operation.

    `torch._foreach_copy_` is what torch's own optimizers use, and has no public name. Where it is gone, a loop does the
    same.
    """
    if _foreach_copy is not None:
        _foreach_copy(targets, values)
        return
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def add_each(counters: list[Tensor], ticks: list[Tensor] | None) -> None:
    """Add to each counter its tick, a tensor of the same dtype, or one, in place; `copy_each` tells of the function."""
    if _foreach_add is not None:
        _foreach_add(counters, 1 if ticks is None else ticks)
        return
    for place, counter in enumerate(counters):
        counter.add_(1 if ticks is None else ticks[place])


def saved_statistics(output: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the batch's mean and ``1 / sqrt(biased variance + eps)`` that batch norm's kernel keeps for backward, (C,)
    each; None if it keeps none.

    They are ``_saved_result1`` and ``_saved_result2`` of the output's graph node. The names that begin with ``_saved``
    are not documented; without them, or without a graph, the moments must be computed from the input again. So they
    must where nothing tells whether there are hooks on saved tensors, which has no public name either."""
    node = output.grad_fn
    # Hooks on saved tensors would be called, and those of activation checkpointing run the forward again.
    hooked = _saved_tensors_hooks is None or _saved_tensors_hooks(True) is not None
    # Of one of batch norm's own kernels (native, cuDNN, MIOpen), and not of a Python function of that name.
    if hooked or "BatchNorm" not in type(node).__name__ or isinstance(node, torch.autograd.function.BackwardCFunction):
        return None
    mean, inverse = getattr(node, "_saved_result1", None), getattr(node, "_saved_result2", None)
    if not (
        isinstance(mean, Tensor) and isinstance(inverse, Tensor) and mean.shape == inverse.shape == output.shape[1:2]
    ):
        return None
    return mean, inverse


def divided(tensor: Tensor) -> tuple[Tensor, Hashable] | None:
    """Return the tensor that `tensor` holds some samples of, as ``chunk`` and ``split`` give them, and which values of
    each; None if it is no such part.

    What a view is one of has no public name; without ``_base`` each part of a batch is a batch."""
    whole: Tensor | None = getattr(tensor, "_base", None)
    if whole is None or not (tensor.dim() and whole.dim() and tensor.stride(0)):
        return None
    if len(tensor) >= len(whole) or tensor.stride(0) != whole.stride(0):
        return None
    return whole, (tensor.storage_offset() % tensor.stride(0), tensor.shape[1:], tensor.stride())


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Return the values of tensors of one type and device one behind the other, in a tensor of one dimension.

    What DDP does for its buckets; ``torch.cat`` over a view of each takes several times as long for many small tensors,
    and does it where the function is gone.
    """
    if _flatten_dense_tensors is None:
        return torch.cat([tensor.reshape(-1) for tensor in tensors])
    flat: Tensor = _flatten_dense_tensors(tensors)
    return flat


class _AwaitedBuffers(dict[str, Any]):
    """The buffers of a module whose values are still on their way: whoever looks waits for them first."""

    def __init__(self, buffers: dict[str, Any], arrive: Callable[[], None]) -> None:
        super().__init__(buffers)  # C code reads past the methods, and finds the same tensors
        self.buffers = buffers
        self.arrive = arrive

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        self.arrive()
        return copy.deepcopy(self.buffers, memo)


def second_loader(loader: Any) -> Any:
    """Return a loader that can be iterated while another iterator of it is running: of a `DataLoader` a copy, and
    anything else itself.

    With persistent workers, ``iter()`` of a loader whose iterator is running resets that iterator, which the loader
    holds in an attribute without a public name; where that is gone, the copy is like the loader.
    """
    if not isinstance(loader, DataLoader):
        return loader
    own = copy.copy(loader)
    if hasattr(own, "_iterator"):
        own._iterator = None
    return own


def _waiting(name: str) -> Callable[..., Any]:
    def method(self: _AwaitedBuffers, *args: Any) -> Any:
        self.arrive()
        return getattr(self.buffers, name)(*args)

    return method


# All but `in` and `len`, which ask for names and not for values.
for _name in (
    *("__getitem__", "__iter__", "__reversed__", "get", "items", "keys", "values", "copy", "__or__", "__eq__"),
    *("__setitem__", "__delitem__", "__ior__", "pop", "popitem", "update", "setdefault", "clear", "__reduce_ex__"),
):
    setattr(_AwaitedBuffers, _name, _waiting(_name))


def await_buffers(modules: Iterable[nn.Module], finish: Callable[[], None]) -> None:
    """Have `finish`, which waits for the values of the modules' buffers and writes them, called when somebody asks for
    a buffer of any of them: an attribute, ``buffers()``, ``state_dict()``, a move, a copy or a pickle of the module.

    A module finds its buffers in a dict of its own, ``_buffers``, and nothing public tells that one is read. Until then
    another dict stands in the place of each. Where the dict is gone, `finish` is called at once.
    """
    waiting: dict[nn.Module, dict[str, Any]] = {
        module: module.__dict__["_buffers"] for module in modules if "_buffers" in module.__dict__
    }

    def arrive() -> None:
        if waiting:
            for module, buffers in waiting.items():
                module.__dict__["_buffers"] = buffers
            waiting.clear()
            finish()

    if not waiting:
        finish()
    for module, buffers in waiting.items():
        module.__dict__["_buffers"] = _AwaitedBuffers(buffers, arrive)
