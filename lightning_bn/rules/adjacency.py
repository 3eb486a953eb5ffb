"""BN303 and BN305, and what they are judged by: the operation that directly feeds a batch norm, and how often a loss
depends on it, proved by the autograd graph of one training batch and not guessed from the module tree."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from lightning_bn.discovery import BatchNormLayer, user_name
from lightning_bn.error_boundary import UNBOUNDED, ErrorBoundary
from lightning_bn.rules.finding import Fix
from lightning_bn.rules.fixes import listing
from lightning_bn.rules.rule import Rule, Seen

# Where the bias stands among the inputs of a node, and the dimension of its output that it is added along.
_BIAS_PLACE = {"ConvolutionBackward0": 2, "AddmmBackward0": 0}


@dataclass(frozen=True)
class DeadBias:
    """A bias added to what a batch norm, and nothing else, then takes the mean of."""

    bias: str
    layer: str


@dataclass(frozen=True)
class DropoutShift:
    """A dropout whose output is the very input of a batch norm."""

    dropout: str
    layer: str
    p: float
    ratio: float
    """Mean over channels of the variance behind it over the variance before it, in one training batch."""


class BiasBeforeBatchNorm(Rule):
    code = "BN303"
    title = "a bias directly before a batch norm has no effect"
    level = "info"
    why = (
        "batch norm subtracts the mean, and with it whatever was added to all values of a channel: the bias has no "
        "gradient."
    )

    def seen(self, biases: Sequence[DeadBias]) -> Iterator[Seen]:
        """Look at the biases that a batch norm takes away."""
        if biases:
            names = [each.bias for each in biases]
            yield Seen(
                [each.layer for each in biases],
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

    def seen(self, dropouts: Sequence[DropoutShift], root: str) -> Iterator[Seen]:
        """Look at the variances on either side of a dropout that feeds a batch norm; `root` is how the model is
        called."""
        if dropouts:
            first = dropouts[0]
            yield Seen(
                [each.layer for each in dropouts],
                f"behind {first.dropout} (p={first.p}) the variance was {first.ratio:.2f} times that before it.",
                fix=Fix(
                    f"recalibrate({root}, batches)", "after training", "or put the dropout after the last batch norm"
                ),
            )


class Adjacency:
    """Hooks for the length of one training batch; `close` removes them.

    Args:
        model: whose parameters and dropouts are named.
        layers: its batch-norm layers.
        boundary: stands around every hook.

    Attributes:
        tracing: whether the batch is still to come.
    """

    def __init__(self, model: nn.Module, layers: Iterable[BatchNormLayer], boundary: ErrorBoundary = UNBOUNDED) -> None:
        self._boundary = boundary
        self.tracing = True
        self._parameters: dict[Tensor, str] = {
            parameter: user_name(name) for name, parameter in model.named_parameters()
        }
        self._candidates: dict[str, tuple[Node, str]] = {}  # by batch norm: the node before it, and the bias in that
        self._edges: Counter[Node] = Counter()
        self.uses: Counter[str] = Counter()
        """How often the loss depends on each layer that ran more than once."""
        self._calls: Counter[str] = Counter()
        self._layers = {layer.name: layer.module for layer in layers}
        self._dropped: list[tuple[weakref.ref[Tensor], str, float, Tensor]] = []
        self._shifts: list[tuple[str, str, float, Tensor]] = []
        self._handles: list[RemovableHandle] = [
            layer.register_forward_pre_hook(self._before_batch_norm(name)) for name, layer in self._layers.items()
        ]
        for name, module in model.named_modules():
            if isinstance(module, _DropoutNd):
                self._handles.append(module.register_forward_hook(self._after_dropout(user_name(name))))

    def close(self) -> None:
        """Remove the hooks, and let go of the graph."""
        self.tracing = False
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
        todo = [tensor.grad_fn for tensor in _flat(outputs) if tensor.grad_fn is not None]
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

    def dead_biases(self) -> list[DeadBias]:
        """Return the biases of which `trace` met one reader, the batch norm."""
        return [DeadBias(bias, layer) for layer, (node, bias) in self._candidates.items() if self._edges[node] == 1]

    def dropout_shifts(self) -> list[DropoutShift]:
        """Return the dropouts whose output was a batch norm's input; waits for the device."""
        return [DropoutShift(dropout, layer, p, ratio.item()) for dropout, layer, p, ratio in self._shifts]

    def _before_batch_norm(self, name: str) -> Callable[[_BatchNorm, tuple[Any, ...]], None]:
        def look(layer: _BatchNorm, args: tuple[Any, ...]) -> None:
            input = args[0] if args else None
            if torch.compiler.is_compiling() or not layer.training or not isinstance(input, Tensor):
                return
            self._calls[name] += torch.is_grad_enabled()
            for dropped, dropout, p, ratio in self._dropped:
                if dropped() is input:
                    self._shifts.append((dropout, name, p, ratio))
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


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _flat(item)] if isinstance(value, (tuple, list)) else []
