"""Parameters and models that are spread over ranks: what can be read of them, and what can't be done with them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lightning_bn.discovery import BatchNormLayer
from lightning_bn.torch_internals import all_modules, all_parameters

_SHAPE, _STORAGE, _SIZE = attrgetter("shape"), methodcaller("untyped_storage"), methodcaller("size")


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a forward of `model` fetches parameters from other ranks, so that all ranks must run it together:
    ``fully_shard``, ``FullyShardedDataParallel``, tensor parallelism, DeepSpeed's stage 3."""
    fsdp1 = _known("torch.distributed.fsdp", "FullyShardedDataParallel")
    if fsdp1 and any(isinstance(module, fsdp1) for module in all_modules(model)):
        return True
    return any(_is_dtensor(parameter) or is_transient(parameter) for parameter in _unusual(all_parameters(model)))


def _unusual(parameters: Iterable[Parameter]) -> list[Parameter]:
    """Return those of a class of their own or with attributes, found in C: an ordinary model has none."""
    parameters = list(parameters)
    return parameters if set(map(type, parameters)) - {Parameter} else list(filter(vars, parameters))


def is_fsdp1(module: nn.Module) -> bool:
    """Tell whether `module` is a ``FullyShardedDataParallel``: parameters are there inside of its forward alone."""
    return isinstance(module, _known("torch.distributed.fsdp", "FullyShardedDataParallel"))


def is_transient(parameter: Tensor) -> bool:
    """Tell whether ``FullyShardedDataParallel`` or DeepSpeed's stage 3 puts storage under `parameter` for a while, and
    keeps account of it elsewhere: whoever puts back what was there before breaks that."""
    # Both mark each parameter; the wrapper may be around the model, out of its sight.
    return hasattr(parameter, "ds_id") or getattr(parameter, "_fsdp_flattened", False)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of a ``DataParallel``, ``DistributedDataParallel`` or DeepSpeed engine, any other as it
    is."""
    wrappers = (DataParallel, DistributedDataParallel, _known("deepspeed", "DeepSpeedEngine"))
    return model.module if isinstance(model, wrappers) else model


def full_value(parameter: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Return the whole of `parameter`, of that shape; every rank must ask for it together.

    None where it can't be told: ``FullyShardedDataParallel`` and DeepSpeed leave an empty tensor, or a piece, between
    two forwards.
    """
    # Where no graph is recorded there is nothing to detach from, and a layer costs one operation less.
    whole: Tensor = parameter.detach() if torch.is_grad_enabled() else parameter
    if _is_dtensor(whole):
        whole = whole.full_tensor()  # type: ignore[attr-defined]
    return whole if whole.shape == shape and whole.untyped_storage().size() else None


def full_vectors(parameters: Sequence[Any], widths: Sequence[int]) -> list[Tensor]:
    """Return the whole of those of `parameters` that are tensors, (C,) each, NaN where it can't be told; every rank
    must ask for it together.

    Args:
        parameters: one a layer; anything else than a tensor where a layer has none.
        widths: C of each.
    """
    # The usual case, in which no Python is run for each of what may be hundreds: ordinary tensors with their values.
    if (
        {Parameter, Tensor}.issuperset(map(type, parameters))
        and list(map(_SHAPE, parameters)) == list(zip(widths))
        and all(map(_SIZE, map(_STORAGE, parameters)))
    ):
        return list(parameters)
    pairs = [pair for pair in zip(parameters, widths, strict=True) if isinstance(pair[0], Tensor)]
    found = [full_value(parameter, (width,)) for parameter, width in pairs]
    return [
        torch.full((width,), torch.nan, device=parameter.device) if whole is None else whole
        for whole, (parameter, width) in zip(found, pairs, strict=True)
    ]


def local_value(parameter: Tensor) -> Tensor:
    """Return the part of `parameter` that this rank has, which may be empty; no rank waits for another."""
    part: Tensor = parameter.detach()
    return part.to_local() if _is_dtensor(part) else part  # type: ignore[attr-defined]


def check_not_distributed(layers: Iterable[BatchNormLayer], call: str) -> None:
    """Raise where running statistics are DTensors, as ``distribute_module`` makes of all buffers.

    Raises:
        TypeError: with the layer's name.
    """
    for layer in layers:
        if isinstance(layer.module.running_mean, Tensor) and _is_dtensor(layer.module.running_mean):
            raise TypeError(
                f"{call}: the running statistics of {layer.name or 'the model'} ({layer.kind}) are DTensors, which "
                "this package does not write. Leave the layer out of distribute_module; fully_shard and "
                "parallelize_module leave buffers as they are."
            )


def check_each_sees_its_own(model: nn.Module, call: str) -> None:
    """Raise where ranks divide a layer of `model` between them, and so see the same batches: who merges the batches of
    all ranks would count these several times.

    Raises:
        ValueError: with the argument that names the ranks to count.
    """
    spread: list[Any] = [parameter for parameter in _unusual(all_parameters(model)) if _is_dtensor(parameter)]
    meshes = {parameter.device_mesh for parameter in spread}
    fsdp2 = _known("torch.distributed.fsdp", "FSDPModule")
    # fully_shard puts all on one mesh, all of whose ranks see batches of their own.
    if len(meshes) > 1 or (meshes and not any(isinstance(module, fsdp2) for module in model.modules())):
        named = " and ".join(sorted(f"{mesh.mesh_dim_names or 'unnamed'} of {mesh.size()} ranks" for mesh in meshes))
        raise ValueError(
            f"{call}: tensor parallelism divides layers of the model between ranks (device mesh {named}), which see "
            "the same batches and would be counted several times. Pass the ranks that see different ones: "
            "process_group=mesh['dp'].get_group(), by the name of that dimension of the mesh; where all ranks see the "
            "same, process_group=dist.new_group([dist.get_rank()], use_local_synchronization=True)."
        )


def _is_dtensor(tensor: Tensor) -> bool:
    # Most are not, which their class tells sooner.
    return type(tensor) not in _PLAIN and isinstance(tensor, _known("torch.distributed.tensor", "DTensor"))


_PLAIN = (Tensor, nn.Parameter)


def _known(module: str, name: str) -> Any:
    """Return a class of torch's if anybody has imported it, else nothing that could be an instance of it: it costs a
    second."""
    return getattr(sys.modules.get(module), name, ())
