"""Which layers learn, which are frozen, and which are copies of a network whose weights are averaged: someone other
than an optimizer writes these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from lightning_bn.discovery import BatchNormLayer, NamedModules, is_inside
from lightning_bn.rules.arguments import Setting
from lightning_bn.rules.fixes import modules_of
from lightning_bn.rules.observer import Observer
from lightning_bn.rules.snapshots import StatisticsSnapshot, versions
from lightning_bn.sharding import local_value
from lightning_bn.torch_internals import parameters_of


class Learning:
    """A parameter learns if it requires grad and, where the optimizers are known, one of them holds it.

    Args:
        observer: knows the model.
        setting: knows the optimizers, or not.
    """

    def __init__(self, observer: Observer, setting: Setting) -> None:
        optimizers = setting.optimizers() if setting.optimizers is not None else ()
        held = {id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]}
        own = {id(parameter) for module in observer.modules for parameter in module.parameters(recurse=False)}
        # Sharded parameters are others than the model's: then nothing is known.
        self.held = held if held & own else None
        self.repeats = setting.repeats or any(isinstance(each, LBFGS) for each in optimizers)
        """Whether an optimizer runs a batch several times at weights of its own."""

    def parameter(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter learns."""
        return parameter.requires_grad and (self.held is None or id(parameter) in self.held)

    def frozen(self, layer: BatchNormLayer) -> bool:
        """Whether no parameter of the layer learns; a layer without any is as free as the module around it."""
        return layer.is_frozen(self.parameter)

    def left_out(self, layer: BatchNormLayer) -> bool:
        """Whether the layer's parameters require grad, and no optimizer holds one of them."""
        return self.frozen(layer) and any(
            parameter.requires_grad for parameter in layer.module.parameters(recurse=False)
        )


_SAMPLE = 16  # values of a parameter that are compared: an averaged parameter changes in all of them


class Copies:
    """Watches the weights of the layers that do not learn: on the host from batch to batch, and by their values from
    epoch to epoch.

    Args:
        observer: knows the layers.
    """

    def __init__(self, observer: Observer) -> None:
        self.held: set[int] = set()
        """Indices of the layers that do not learn."""
        self.written: set[int] = set()
        """Indices of the layers whose weights were written while no optimizer held them."""
        self._observer = observer
        # Version and values of the weight since the layer does not learn.
        self._held: dict[int, tuple[int, Tensor | None]] = {}
        self._watched: list[tuple[int, int, Mapping[str, Tensor | None]]] = []  # index, version, parameters
        self._decided: set[int] = set()
        self._start: tuple[Tensor, StatisticsSnapshot] | None = None

    def begin(self) -> None:
        """Training begins: keep what weights and statistics are."""
        if self._start is None:
            self._start = self._samples(), StatisticsSnapshot(self._observer.layers)

    def compare(self) -> None:
        """Note which of the layers that do not learn were written all the same; at the beginning and at the end of each
        batch, on the host."""
        if self._watched:
            now = versions([parameters for _, _, parameters in self._watched], "weight")
            self.written.update(
                index for (index, version, _), one in zip(self._watched, now, strict=True) if one != version
            )

    def hold(self, frozen: Iterable[int]) -> None:
        """From here on, the layers `frozen`, and no others, do not learn."""
        self.held = frozen = set(frozen)
        layers = self._observer.layers
        weights = versions([parameters_of(layer.module) for layer in layers], "weight")
        self._held = {index: self._held.get(index) or (weights[index], _sample(layers[index])) for index in frozen}
        self._watched = [(i, version, parameters_of(layers[i].module)) for i, (version, _) in self._held.items()]
        self.written &= frozen
        self._decided &= frozen

    def look(self) -> None:
        """An epoch has passed, in which a copy would have been written; a write to ``.data`` leaves no version. Waits
        for the device."""
        for index, (_, before) in self._held.items():
            now = _sample(self._observer.layers[index])
            if before is not None and now is not None and not torch.equal(before.to(now.device), now):
                self.written.add(index)
        self._decided = set(self._held)

    def stale(self, among: Iterable[int]) -> list[int]:
        """Return those of the layers `among` whose weights have changed since training began, and whose statistics have
        not.

        Waits for the device.
        """
        candidates = sorted(set(among))
        if self._start is None or not candidates:
            return []
        weights, statistics = self._start
        changed = (self._samples() != weights.to(self._device())).any(1).tolist()
        before, now = statistics.values(), StatisticsSnapshot(self._observer.layers).values()
        return [
            each
            for each in candidates
            if changed[each] and each in before and each in now and now[each].equals(before[each])
        ]

    def undecided(self, learning: Learning) -> list[str]:
        """Return the names of the layers that do not learn, have each a twin that does, and of which no more is known
        yet."""
        layers = self._observer.layers
        twins = {
            shape_of(layer)
            for index, layer in enumerate(layers)
            if index not in self._held and not learning.frozen(layer)
        }
        names = [layers[index].name for index in self._held]
        odd = [layers[index].name for index in self._held if shape_of(layers[index]) not in twins]
        # A part of the model is a copy as a whole or not at all, together with what is frozen beside it.
        tops = modules_of(names, [layer.name for layer in layers])
        parts = [top for top in tops if not any(is_inside(name, top.rpartition(".")[0] or top) for name in odd)]
        open_ = [layers[index].name for index in self._held if index not in self.written | self._decided]
        return [name for name in open_ if any(is_inside(name, top) for top in parts)]

    def _samples(self) -> Tensor:
        """A few values of the weight of each layer: (layers, _SAMPLE)."""
        rows = torch.zeros(len(self._observer.layers), _SAMPLE, device=self._device())
        for row, layer in zip(rows, self._observer.layers, strict=True):
            values = _sample(layer)
            if values is not None:
                row[: len(values)] = values
        return rows

    def _device(self) -> torch.device:
        weights = [layer.module.weight for layer in self._observer.layers if layer.module.weight is not None]
        return weights[0].device if weights and not weights[0].is_meta else torch.device("cpu")


def twin(model: NamedModules, region: str, moving: Iterable[int]) -> str | None:
    """Return the name of a module outside of `region` that has the same buffers, and whose statistics move: what
    `region` is a copy of."""
    modules = dict(zip(model.names, model.modules, strict=True))
    wanted = [(name, buffer.shape) for name, buffer in modules[region].named_buffers()]
    moved = [model.layers[index].name for index in moving]
    for name, module in modules.items():
        if is_inside(name, region) or is_inside(region, name) or not any(is_inside(each, name) for each in moved):
            continue
        if [(part, buffer.shape) for part, buffer in module.named_buffers()] == wanted:
            return name
    return None


def shape_of(layer: BatchNormLayer) -> tuple[type, int]:
    """Return what a layer and its copy have in common: the class and the number of channels."""
    return type(layer.module), layer.module.num_features


def _sample(layer: BatchNormLayer) -> Tensor | None:
    """A copy of the first values of the layer's weight, of those that this rank has."""
    weight = layer.module.weight
    if weight is None or weight.is_meta or isinstance(weight, nn.UninitializedParameter):
        return None
    return local_value(weight).reshape(-1)[:_SAMPLE].float().clone()
