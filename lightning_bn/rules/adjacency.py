"""BN303 and BN305, and what they are judged by: the operation that directly feeds a batch norm, and how often a loss
depends on it, proved by the autograd graph of one training batch and not guessed from the module tree."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from lightning_bn.discovery import listing, user_name
from lightning_bn.rules.finding import Fix
from lightning_bn.rules.observer import Observer, nested_tensors
from lightning_bn.rules.rule import Occasion, Rule, Seen

# Where the bias stands among the inputs of a node, and the dimension of its output that it is added along.
_BIAS_PLACE = {"ConvolutionBackward0": 2, "AddmmBackward0": 0}


class DropoutShift(NamedTuple):
    """A dropout whose output is the very input of a batch norm."""

    dropout: str
    layer: str
    p: float
    ratio: Tensor
    """Mean over channels of the variance behind it over the variance before it, in one training batch."""


class BiasBeforeBatchNorm(Rule):
    code = "BN303"
    title = "a bias directly before a batch norm has no effect"
    level = "info"
    why = (
        "batch norm subtracts the mean, and with it whatever was added to all values of a channel: the bias has no "
        "gradient."
    )

    def graph(self, at: Occasion, adjacency: Adjacency) -> Iterator[Seen]:
        biases = adjacency.dead_biases()
        if biases:
            names = list(biases.values())
            yield Seen(
                list(biases),
                f"in the graph of the loss, {listing(names)} goes into a batch norm and nowhere else.",
                fix=Fix(
                    "bias=False",
                    "where the model is built",
                    f"at {names[0].rpartition('.')[0]}: the batch norm has a bias of its own",
                ),
            )


class DropoutBeforeBatchNorm(Rule):
    code = "BN305"
    title = "dropout directly before a batch norm"
    level = "info"
    why = (
        "dropout raises the variance only in training; in eval the layer divides by one its input does not have (Li "
        "et al. 2019)."
    )

    def __init__(self) -> None:
        self._shifts: list[DropoutShift] = []

    def graph(self, at: Occasion, adjacency: Adjacency) -> None:
        self._shifts = adjacency.shifts  # on the device

    def examine(self, at: Occasion) -> Iterator[Seen]:
        shifts, self._shifts = self._shifts, []
        if shifts:
            dropout, _, p, ratio = shifts[0]
            yield Seen(
                [each.layer for each in shifts],
                f"behind {dropout} (p={p}) the variance was {ratio.item():.2f} times that before it.",
                fix=Fix(
                    f"recalibrate({at.setting.root}, batches)",
                    "after training",
                    "or put the dropout after the last batch norm",
                ),
            )


class Adjacency:
    """Hooks for the length of one training batch; `close` removes them.

    Args:
        observer: knows the model; its boundary stands around every hook.
    """

    def __init__(self, observer: Observer) -> None:
        self._boundary = observer.boundary
        named = observer.modules[0].named_parameters()
        self._parameters: dict[Tensor, str] = {parameter: user_name(name) for name, parameter in named}
        self._candidates: dict[str, tuple[Node, str]] = {}  # by batch norm: the node before it, and the bias in that
        self._edges: Counter[Node] = Counter()
        self.uses: Counter[str] = Counter()
        """How often the loss depends on each layer that ran more than once."""
        self._calls: Counter[str] = Counter()
        self._layers = {layer.name: layer.module for layer in observer.layers}
        self._dropped: list[tuple[weakref.ref[Tensor], str, float, Tensor]] = []
        self.shifts: list[DropoutShift] = []
        """The dropouts whose output was a batch norm's input."""
        self._handles: list[RemovableHandle] = [
            layer.register_forward_pre_hook(self._before_batch_norm(name)) for name, layer in self._layers.items()
        ]
        for name, module in zip(observer.names, observer.modules, strict=True):
            if isinstance(module, _DropoutNd):
                self._handles.append(module.register_forward_hook(self._after_dropout(name)))

    def close(self) -> None:
        """Remove the hooks, and let go of the graph."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._candidates, self._dropped = [], {}, []
        self._edges.clear()
        self._layers = {}

    def trace(self, outputs: Any, *, loss: bool) -> None:
        """Count, in the graph behind the tensors `outputs`, who else reads what goes into each batch norm, and in that
        of a `loss` each use of the layers that ran more than once."""
        wanted = {node for node, _ in self._candidates.values()}
        again: dict[Tensor, str] = {
            layer.weight: name
            for name, layer in self._layers.items()
            if loss and self._calls[name] > 1 and layer.weight is not None
        }
        todo = [tensor.grad_fn for tensor in nested_tensors(outputs) if tensor.grad_fn is not None]
        known = set(todo)
        while todo and (wanted or again):
            reader = todo.pop()
            if again and "BatchNorm" in reader.name():
                self.uses.update(again[weight] for weight in _parameters(reader) if weight in again)
            for node, _ in reader.next_functions:
                if node in wanted:
                    self._edges[node] += 1
                if node is not None and node not in known:
                    known.add(node)
                    todo.append(node)

    def dead_biases(self) -> dict[str, str]:
        """Return the biases of which `trace` met one reader, the batch norm of that name."""
        return {layer: bias for layer, (node, bias) in self._candidates.items() if self._edges[node] == 1}

    def _before_batch_norm(self, name: str) -> Callable[[_BatchNorm, tuple[Any, ...]], None]:
        def look(layer: _BatchNorm, args: tuple[Any, ...]) -> None:
            input = args[0] if args else None
            if torch.compiler.is_compiling() or not layer.training or not isinstance(input, Tensor):
                return
            self._calls[name] += torch.is_grad_enabled()
            for dropped, dropout, p, ratio in self._dropped:
                if dropped() is input:
                    self.shifts.append(DropoutShift(dropout, name, p, ratio))
            node, bias = input.grad_fn, self._bias_before(input)
            if node is not None and bias is not None:
                self._candidates.setdefault(name, (node, bias))

        return self._boundary.guard(look)

    def _bias_before(self, input: Tensor) -> str | None:
        node = input.grad_fn
        place = _BIAS_PLACE.get(node.name()) if node is not None else None
        # A linear layer's bias lies along the last dimension, which is a batch norm's channels in (N, C) alone.
        if node is None or place is None or (place == 0 and input.dim() != 2):
            return None
        bias = _leaf(node.next_functions[place][0])
        return self._parameters.get(bias) if bias is not None and bias.shape == input.shape[1:2] else None

    def _after_dropout(self, name: str) -> Callable[[_DropoutNd, tuple[Any, ...], Any], None]:
        def look(dropout: _DropoutNd, args: tuple[Any, ...], output: Any) -> None:
            if (
                torch.compiler.is_compiling()
                or not dropout.training
                or dropout.p == 0
                or not isinstance(output, Tensor)
                or output.dim() < 2
            ):
                return
            with torch.no_grad():
                over = [dim for dim in range(output.dim()) if dim != 1]
                before, after = (tensor.float().var(over) for tensor in (args[0], output))
                ratio = (after.sum() / before.sum()).nan_to_num(1.0)
            self._dropped.append((weakref.ref(output), name, dropout.p, ratio))

        return self._boundary.guard(look)


def _leaf(node: Node | None) -> Tensor | None:
    """Return the parameter behind a node, through the casts of autocast."""
    while node is not None and node.name() == "ToCopyBackward0":
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def _parameters(node: Node) -> list[Tensor]:
    """Return the parameters that a node reads."""
    return [leaf for source, _ in node.next_functions if (leaf := _leaf(source)) is not None]
