"""Reads a program of TorchScript: its code as text, its numbers as an inert description; nothing in it runs."""

from __future__ import annotations

import ast
import io
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from lightning_bn.checkpoints.norms import Unjudged, norms_in, tensor_of
from lightning_bn.checkpoints.reading import storage_of
from lightning_bn.checkpoints.stored import Archive
from lightning_bn.checkpoints.unpickling import Described, read_pickle
from lightning_bn.exports.program import Leaf, NormUse, Program, WeightedUse

_NORMS = ("batch_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "sync_batch_norm")
_DROPOUTS = ("dropout", "dropout_", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
_RANDOM = ("rand", "randn", "rand_like", "randn_like", "bernoulli", "multinomial", "normal")
_WEIGHTED = (*(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)), "_convolution", "linear")


def is_script(archive: Archive) -> bool:
    """Whether an archive is of ``torch.jit.save``."""
    return any(name.rpartition("/")[2] == "constants.pkl" for name in archive.records)


def read_script(archive: Archive) -> Program:
    """Return what is in a file of ``torch.jit.save``.

    Raises:
        whatever damaged pickles raise.
    """
    constants = next(name for name in archive.records if name.rpartition("/")[2] == "constants.pkl")
    folder = constants.removesuffix("constants.pkl")
    root, _ = read_pickle(io.BytesIO(archive.read(f"{folder}data.pkl")), partial(storage_of, archive, f"{folder}data/"))
    values, _ = read_pickle(io.BytesIO(archive.read(constants)), partial(storage_of, archive, f"{folder}constants/"))
    reader = _Reader(archive, folder, values if isinstance(values, tuple) else ())
    for name, module in _modules(root):
        reader.read(name, module)
    norms, unjudged = norms_in(reader.state)
    return Program(
        "TorchScript",
        tuple(reader.uses),
        tuple(norms),
        tuple(reader.layers),
        tuple(reader.random),
        (*unjudged, *reader.unjudged),
    )


def _modules(root: Any) -> Iterator[tuple[str, Described]]:
    """The objects of a program by the attributes that lead to them, as they are in a model."""
    waiting, seen = [("", root)], set()
    while waiting:
        name, module = waiting.pop()
        if not isinstance(module, Described) or id(module) in seen or not isinstance(module.state, Mapping):
            continue
        seen.add(id(module))
        yield name, module
        waiting.extend((f"{name}.{key}" if name else str(key), each) for key, each in reversed([*module.state.items()]))


class _Reader:
    """Collects what the methods of each object do with what it holds."""

    def __init__(self, archive: Archive, folder: str, constants: tuple[Any, ...]) -> None:
        self._archive = archive
        self._folder = folder
        self._constants = constants
        self._code: dict[str, ast.Module | None] = {}
        self._self = ""  # what a method calls its object
        self.uses: list[NormUse] = []
        self.layers: list[WeightedUse] = []
        self.random: list[str] = []
        self.state: dict[str, Leaf] = {}
        self.unjudged: list[Unjudged] = []

    def read(self, name: str, module: Described) -> None:
        parsed = self._class(module)
        if parsed is None:
            self.unjudged.append(Unjudged(name, "its code can't be read: not judged."))
            return
        for method in parsed.body:
            if isinstance(method, ast.FunctionDef):
                self._method(name, module.state, method)

    def _class(self, module: Described) -> ast.ClassDef | None:
        record = f"{self._folder}code/{module.module.replace('.', '/')}.py"
        if record not in self._code:
            try:
                self._code[record] = ast.parse(self._archive.read(record).decode())
            except (KeyError, SyntaxError, ValueError):
                self._code[record] = None
        body = getattr(self._code[record], "body", [])
        return next((node for node in body if isinstance(node, ast.ClassDef) and node.name == module.name), None)

    def _method(self, name: str, attributes: Mapping[str, Any], method: ast.FunctionDef) -> None:
        self._self = method.args.args[0].arg if method.args.args else ""
        assigned: dict[str, ast.expr] = {}
        for node in ast.walk(method):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                assigned[node.targets[0].id] = node.value
        for node in ast.walk(method):
            if isinstance(node, ast.Call):
                called = assigned.get(node.func.id) if isinstance(node.func, ast.Name) else node.func
                operation = called.attr if isinstance(called, ast.Attribute) else ""
                given = [self._value(each, assigned, attributes) for each in node.args]
                if operation in _NORMS and len(given) > 7:
                    # A function of torch.nn.functional, by a name of its own, takes the statistics first.
                    turned = isinstance(node.func, ast.Name)
                    self._norm(name, operation, given[3:5] + given[1:3] if turned else given[1:5], given)
                elif operation in _RANDOM or (operation in _DROPOUTS and len(given) > 2 and all(given[1:3])):
                    self.random.append(name or operation)
                elif operation in _WEIGHTED and len(given) > 1 and tensor_of(given[1]) is not None:
                    self._weighted(name, operation, given)

    def _value(self, node: ast.expr, assigned: Mapping[str, ast.expr], attributes: Mapping[str, Any]) -> Any:
        """What an argument is: a constant, a tensor, or `_UNKNOWN`."""
        for _ in range(len(assigned) + 1):
            if not isinstance(node, ast.Name) or node.id not in assigned:
                break
            if node.id.startswith("bn_training"):  # what torch's own layer makes of its mode
                return True if attributes.get("running_mean") is None else attributes.get("training", _UNKNOWN)
            node = assigned[node.id]
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.List):
            return [self._value(each, assigned, attributes) for each in node.elts]
        if isinstance(node, ast.Attribute):
            named = node.value.id if isinstance(node.value, ast.Name) else ""
            if named == "CONSTANTS":
                place = int(node.attr[1:]) if node.attr[1:].isdigit() else len(self._constants)
                return self._constants[place] if place < len(self._constants) else _UNKNOWN
            if named == self._self:
                return attributes.get(node.attr, _UNKNOWN)
            owner = self._value(node.value, assigned, attributes)  # another object, as (self.conv).weight
            if isinstance(owner, Described) and isinstance(owner.state, Mapping):
                return owner.state.get(node.attr, _UNKNOWN)
        return _UNKNOWN

    def _norm(self, name: str, operation: str, tensors: list[Any], given: list[Any]) -> None:
        own = name or f"{operation} {len(self.uses)}"
        leaves = [tensor_of(each) for each in tensors]
        training = given[5] if isinstance(given[5], bool) else None
        by_batch = True if leaves[2] is None else training
        eps = given[7] if isinstance(given[7], float) else None
        self.uses.append(NormUse(own, by_batch, bool(by_batch) and leaves[2] is not None, eps))
        if leaves[2] is not None:
            for part, leaf in zip(("weight", "bias", "running_mean", "running_var"), leaves, strict=True):
                if leaf is not None:
                    self.state[f"{own}.{part}"] = leaf

    def _weighted(self, name: str, operation: str, given: list[Any]) -> None:
        weight, bias = tensor_of(given[1]), tensor_of(given[2]) if len(given) > 2 else None
        if weight is None:
            return
        transposed = "transpose" in operation or (operation == "_convolution" and given[6] is True)
        place = 8 if operation == "_convolution" else 6
        groups = given[place] if len(given) > place and isinstance(given[place], int) else 1
        self.layers.append(WeightedUse(name, transposed, groups, weight, bias))


_UNKNOWN = object()
