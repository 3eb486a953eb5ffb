"""Reads a program of ONNX; nothing in it runs."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_bn.checkpoints.norms import norms_in
from lightning_bn.checkpoints.reading import CheckpointRefusedError
from lightning_bn.checkpoints.stored import StoredTensor
from lightning_bn.exports.program import Leaf, NormUse, Program, WeightedUse, loaded

_RANDOM = ("RandomUniform", "RandomNormal", "RandomUniformLike", "RandomNormalLike", "Bernoulli", "Multinomial")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul")
"""The last three are onnxruntime's, where its optimiser has put an activation or a transposition into one."""

_ARITHMETIC: dict[str, Callable[..., torch.Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "Sqrt": torch.sqrt,
    "Unsqueeze": lambda values, axes: reduce(torch.unsqueeze, sorted(axes.tolist()), values),
}
_PARTS = ("weight", "bias", "running_mean", "running_var")


def read_onnx(path: Path) -> Program:
    """Return what is in an ONNX file.

    Raises:
        CheckpointRefusedError: onnx is not installed, or it is none.
    """
    try:
        import onnx
    except ImportError as error:
        raise CheckpointRefusedError(f"{path} is read with onnx: pip install 'lightning-bn[export]'.") from error
    model = onnx.load(str(path), load_external_data=False)
    graphs = [model.graph, *model.functions]
    if not any(graph.node for graph in graphs):
        raise CheckpointRefusedError(f"{path} is no ONNX program: it has no operations.")
    uses: list[NormUse] = []
    layers: list[WeightedUse] = []
    random: list[str] = []
    state: dict[str, Leaf] = {}
    for graph in graphs:
        values = _Values(graph, path.parent)
        for node in _nodes(graph):
            if node.op_type == "BatchNormalization":
                use, own = _norm(node, [values.leaf(name) for name in node.input], values)
                uses.append(use)
                state |= own
            elif node.op_type in _WEIGHTED:
                inputs = [values.leaf(name) for name in node.input]
                if (weight := next(iter(inputs[1:2]), None)) is not None:
                    layers.append(_weighted(node, weight, inputs, values))
            elif node.op_type in _RANDOM or (node.op_type == "Dropout" and values.is_true(node.input[2:3])):
                random.append(_layer(node) or node.op_type)
    norms, unjudged = norms_in(state)
    return Program("ONNX", tuple(uses), tuple(norms), tuple(layers), tuple(random), tuple(unjudged))


def _nodes(graph: Any) -> Iterator[Any]:
    """The operations of a graph and of the graphs in its branches and loops."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.g.node else ()), *attribute.graphs):
                yield from _nodes(inner)


class _Values:
    """The constants of a graph by name, also behind an Identity or a Cast, and what arithmetic makes of constants only:
    onnxoptimizer folds a norm by operations that the program runs each time."""

    def __init__(self, graph: Any, folder: Path) -> None:
        self._folder = folder
        self._computed: dict[str, Leaf | None] = {}
        self._operations: dict[str, Any] = {}
        self._constants = {each.name: each for each in getattr(graph, "initializer", ())}
        self._behind: dict[str, str] = {}
        for node in _nodes(graph):
            if node.op_type in ("Identity", "Cast") and node.input:
                self._behind[node.output[0]] = node.input[0]
            elif node.op_type in _ARITHMETIC:
                self._operations[node.output[0]] = node
            elif node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.name == "value":
                        self._constants[node.output[0]] = attribute.t

    def origin(self, name: str) -> str:
        """The name of the constant that stands behind a value."""
        for _ in range(len(self._behind) + 1):
            if name not in self._behind:
                break
            name = self._behind[name]
        return name

    def leaf(self, name: str) -> Leaf | None:
        name = self.origin(name)
        if name in self._operations:
            if name not in self._computed:
                self._computed[name] = None  # in a circle
                self._computed[name] = self._compute(self._operations[name])
            return self._computed[name]
        found = self._constants.get(name)
        return None if found is None else StoredTensor(tuple(found.dims), lambda: _tensor(found, self._folder))

    def _compute(self, node: Any) -> Leaf | None:
        """The result of an operation on constants alone, which is no larger than they are; None of any other."""
        leaves = [self.leaf(name) for name in node.input]
        if any(leaf is None for leaf in leaves):
            return None  # before any number is read: most operations have an input that is no constant
        try:
            given = [loaded(leaf) for leaf in leaves if leaf is not None]
            shapes = [each.shape for each in given[: 1 if node.op_type == "Unsqueeze" else 2]]
            if torch.broadcast_shapes(*shapes).numel() > max(shape.numel() for shape in shapes):
                return None
            # In the coarsest of their dtypes: what is compared with the result has to know how it was rounded.
            dtypes = [each.dtype for each in given if each.is_floating_point()]
            return _ARITHMETIC[node.op_type](*given).to(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps))
        except Exception:  # damaged numbers, or such as do not fit
            return None

    def is_true(self, names: Any) -> bool:
        """Whether the one name is a constant that is true."""
        leaves = [self.leaf(name) for name in names]
        return any(isinstance(leaf, StoredTensor) and bool(leaf.load().any()) for leaf in leaves)


def _tensor(found: Any, folder: Path) -> torch.Tensor:
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    if uses_external_data(found):
        copied = onnx.TensorProto()
        copied.CopyFrom(found)
        load_external_data_for_tensor(copied, str(folder))  # which refuses a path out of the folder
        found = copied
    array = np.array(onnx.numpy_helper.to_array(found))
    return torch.from_numpy(
        array if array.dtype.isbuiltin == 1 else array.astype(np.float32)
    )  # bfloat16 is numpy's not


def _norm(node: Any, inputs: list[Leaf | None], values: _Values) -> tuple[NormUse, dict[str, Leaf]]:
    attributes = _attributes(node)
    named = values.origin(node.input[4]) if len(node.input) > 4 else ""
    name = named.removesuffix("running_var").removesuffix(".") if named.endswith("running_var") else _layer(node)
    name = name or node.output[0]
    by_batch = bool(attributes.get("training_mode")) or any(leaf is None for leaf in inputs[3:5])
    own = {f"{name}.{part}": leaf for part, leaf in zip(_PARTS, inputs[1:5], strict=False) if leaf is not None}
    complete = all(leaf is not None for leaf in inputs[3:5])
    return NormUse(name, by_batch, False, float(attributes.get("epsilon", 1e-5))), own if complete else {}


def _weighted(node: Any, leaf: Leaf, inputs: list[Leaf | None], values: _Values) -> WeightedUse:
    attributes, weight = _attributes(node), values.origin(node.input[1])
    scope = _scopes(node)
    folded = scope[-1] if scope and "batchnorm" in _metadata(node).get("pkg.torch.onnx.class_hierarchy", "") else ""
    name = weight.removesuffix(".weight") if weight.endswith(".weight") else "" if scope else _layer(node)
    turned = node.op_type == "ConvTranspose" or node.op_type == "MatMul"
    if node.op_type == "Gemm":
        turned = not attributes.get("transB")
    bias = inputs[2] if len(inputs) > 2 else None
    return WeightedUse(name, turned, int(attributes.get("group", 1)), leaf, bias, node.op_type == "MatMul", folded)


def _attributes(node: Any) -> dict[str, Any]:
    return {each.name: each.i if each.type == 2 else each.f for each in node.attribute if each.type in (1, 2)}


def _metadata(node: Any) -> Mapping[str, str]:
    return {each.key: each.value for each in node.metadata_props}


def _scopes(node: Any) -> list[str]:
    """The modules around an operation, outermost first, as torch's exporter notes them."""
    try:
        scopes = ast.literal_eval(_metadata(node).get("pkg.torch.onnx.name_scopes", "[]"))
    except (ValueError, SyntaxError):
        return []
    return [str(scope) for scope in scopes[:-1]] if isinstance(scopes, list) else []


def _layer(node: Any) -> str:
    """The module of an operation: as the newer exporter notes it, or out of the older one's ``/body/body.8/Conv``."""
    scopes = _scopes(node)
    if scopes:
        return scopes[-1]
    parts = node.name.strip("/").split("/")
    return parts[-2] if len(parts) > 1 else str(node.name)
