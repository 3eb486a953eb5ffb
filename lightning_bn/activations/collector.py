"""Statistics of many layers at once: hooks only while they are wanted, and one transfer to the host for all layers
together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from operator import attrgetter
from typing import Any, TypeAlias
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.activations.call_sites import INPUT, CallSite, CallSites
from lightning_bn.activations.drift import Drift, DriftMeter, Readout
from lightning_bn.activations.host_to_sample import HostMeasurements, NormShapes, SampleBuilder, affine_of
from lightning_bn.activations.kept_samples import KeptSamples
from lightning_bn.activations.moments_to_pool import Key, Pool, merge
from lightning_bn.activations.pool_to_host import Array, joined, silent_numbers, to_host
from lightning_bn.activations.readings import Readings, first_float, float_tensors
from lightning_bn.activations.sample import Sample
from lightning_bn.activations.watched_layers import fusible_layers
from lightning_bn.activations.weight_updates import WeightUpdates
from lightning_bn.discovery import BatchNormLayer
from lightning_bn.error_boundary import UNBOUNDED, ErrorBoundary, guarded
from lightning_bn.modes import eager, is_extra_pass
from lightning_bn.ranks.collective import Ranks
from lightning_bn.set_in_use import OtherSets
from lightning_bn.sharding import full_vectors
from lightning_bn.torch_internals import in_backward, unseen_by_modes
from lightning_bn.torchscript import scriptable

_PLAIN, _WIDTH = {Tensor, nn.Parameter}, attrgetter("num_features")
_Summand: TypeAlias = tuple[str, Key]

_FUSED = (
    "in eval mode torch may run it as one kernel, which watching it, or functions that are not modules, would prevent"
)


class LayerCollector:
    """Statistics of the layers' activations, drift and parameters, from `attach` to `collect`.

    Between `attach` and `detach` a forward hook on each layer takes its output in; both can be called any number of
    times before `collect`, which gives one sample of all that was seen and starts the next. Each call site of a layer
    is a row (`places`): ``relu#1``, ``relu#2``; where one is called with several numbers of channels, each further
    number has a row too: ``relu#2[256]``. The first floating-point tensor of a tuple, list or dict counts. A forward
    that activation checkpointing repeats is not a second sample. Compiled modules run eagerly while hooks are attached.

    Args:
        model: which holds the layers.
        layers: by name, as from `layers.select_layers`.
        training: whether drift is that of training batches, from the buffers, or of the inputs of an evaluation.
        activations: whether to place hooks at all. False: drift and affine parameters only.
        gradients: whether to look at the gradients at the layers' outputs too, and at those of their parameters.
        histograms: names of the layers to count into buckets.
        ranked: names of the layers whose effective rank is measured; None: all rows.
        channel_dim: which dimension holds the channels, a batch norm's aside; None: as the layers around it tell.
        functions: whether to look at functions that are not modules too, and at residual sums.
        step_is_forward: whether the model's own forward stands for a whole training step, as under DDP.
        ranks: those whose activations are one sample, None for all.
        boundary: stands around every hook.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        *,
        training: bool = True,
        activations: bool = True,
        gradients: bool = False,
        histograms: Collection[str] = (),
        ranked: Collection[str] | None = (),
        channel_dim: int | None = None,
        functions: bool = False,
        step_is_forward: bool = False,
        ranks: Ranks | None = None,
        boundary: ErrorBoundary = UNBOUNDED,
    ) -> None:
        self._boundary = boundary
        self.layers = dict(layers)
        self._ranks = ranks or Ranks(task="LayerCollector")
        self._model = model
        self._training, self._activations, self._gradients = training, activations, gradients
        self._readings = Readings(model, self.layers, histograms, ranked, channel_dim)
        self._updates = WeightUpdates(model, None if functions else self.layers)
        self._functions = functions
        self._fusible = fusible_layers(model)
        self._spared: set[nn.Module] = set()  # of these, what has no hooks now
        self.sees_functions = False  # whether it has seen one
        self._norms = {name: layer for name, layer in self.layers.items() if isinstance(layer, _BatchNorm)}
        self._tracking = {
            name: layer
            for name, layer in self._norms.items()
            if BatchNormLayer((name,), layer).tracks and layer.num_batches_tracked is not None
        }
        self._sets = OtherSets(self._norms.values())
        self._meter: DriftMeter | None = None
        self._observed = frozenset(self._tracking)
        self._is_open = False
        self._called: set[str] = set()
        self._builder = SampleBuilder(
            self.layers,
            self._tracking,
            training=training,
            hidden_norms=not self._norms and any(isinstance(each, _BatchNorm) for each in model.modules()),
        )
        self.kept = KeptSamples(self._builder)
        self._sites = CallSites(
            model,
            self.layers,
            step_is_forward=step_is_forward,
            given=self._see_input,
            gave=self._see_result,
            called=self._see_function if functions else None,
            boundary=boundary,
        )
        self._is_given = False  # whether this batch's input has been seen
        self._newest: list[tuple[CallSite, Any]] = []  # the activation that came last, by weak reference
        self._outputs: frozenset[CallSite] = frozenset()
        self._images: frozenset[Key] = frozenset()
        self._attached = ExitStack()
        self._is_placed = self._is_attached = False

    def attach(self) -> None:
        """Place the hooks; the first time since `collect`, drift begins to count."""
        if not self._is_open:
            self._open()
        self._is_attached = True
        self.begin_batch()
        if not self._activations or not (self.layers or self._functions):
            return
        fused = self._fused()
        if self._is_placed and fused == self._spared:
            return
        self._attached.close()
        self._is_placed, self._spared = True, fused
        self._sites.attach(self._attached, self.layers.values(), fused)
        for name, layer in self.layers.items():
            if layer in fused:
                self._called.add(name)
                continue
            see = partial(self._see, name)
            self._attached.callback(layer.register_forward_hook(see, with_kwargs=True).remove)
        self._attached.enter_context(eager(self._model))
        self._attached.callback(scriptable(self._model))

    def _fused(self) -> set[nn.Module]:
        """What torch is to run as without hooks, in the layers' present modes; what the user chose is looked at."""
        chosen = set() if self._functions else set(self.layers.values())
        found: set[nn.Module] = set()
        for name, layer in self._fusible.items():
            parts = set(layer.modules())
            if not layer.training and chosen.isdisjoint(parts):
                found |= parts
                if self._functions:
                    self._readings.left_out.setdefault(name, _FUSED)
        return found

    def _open(self) -> None:
        self._is_open = True
        if self._meter is not None and self._meter.is_outgrown():
            self._meter.close()
            self._meter = None
        if self._meter is None:  # built now, when the model has come to its device
            self._meter = DriftMeter(list(self._tracking.values()), self._boundary)
            names = list(self._tracking)
            if self._training:
                self._observed = frozenset(names[index] for index in self._meter.unreadable())
        if self._training:
            self._meter.start()

    def begin_batch(self) -> None:
        """Count the calls of each layer from 1 again."""
        self._sites.restart()
        self._sets.rest()
        self._is_given = False

    def before_step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the gradients of parameters in, which an optimizer is about to move; before they are clipped."""
        if self._gradients and self._is_attached:
            self._updates.before_step(parameters)
            if self._updates.is_spread:
                self._readings.left_out.setdefault("gradients of parameters", "spread over ranks")

    def detach(self) -> None:
        """Remove the hooks."""
        self.pause()
        self._is_placed = False
        self._attached.close()

    def pause(self) -> None:
        """Take nothing in until `attach`, which comes soon: the hooks stay, as placing them costs a tenth of a step."""
        self._is_attached = False
        self._newest.clear()

    def forget_channels(self) -> None:
        """Let every channel count as never seen: an evaluation begins, whose dead channels are its own."""
        self._builder.history.clear()

    def unseen(self) -> list[str]:
        """Return the layers that no forward has reached so far."""
        return [name for name in self.layers if name not in self._called] if self._activations else []

    def left_out(self) -> dict[str, str]:
        """Return the layers whose activations can't be read, and why."""
        return dict(self._readings.left_out)

    def collect(self, reference: LayerCollector | None = None) -> Sample:
        """Return the sample, the same on every rank, and forget it; every rank must call this, or fail its `ranks`.

        Args:
            reference: the collector of training, with whose inputs those of an evaluation are compared.
        """
        with self._ranks.told():
            measured = self.measure()
            host = to_host(measured)
            pool = None if self._readings.pool is None else self._readings.pool.on(*host[:2])
            sums = dict(zip(self._readings.sums, host[2:], strict=False))
            start = 2 + len(sums)
            weights, biases, norms, statistics = *host[start : start + 3], host[start + 3 :]
            updates = self._updates.of_layers(norms)
            own = None
            if self._meter is not None and self._training and self._is_open:
                (own,) = self._meter.evaluate([self._readout._replace(tensors=statistics)])
        # As objects, since a layer may have run on one rank alone.
        rank_0 = weights, biases, updates, own, statistics
        ranks = self._ranks.share((pool, sums, dict(self._readings.order), self._outputs, self._images, rank_0))
        pools = [each for each, *_ in ranks if each is not None]
        merged = merge(pools) if pools else None
        # Each rank's layers see their own batches; the buffers of the first are the ones that are broadcast and saved.
        weights, biases, updates, drift, statistics = ranks[0][-1]
        found = HostMeasurements(
            merged,
            {key: name for _, _, order, *_ in ranks for key, name in order.items()},
            frozenset().union(*(outputs for *_, outputs, _, _ in ranks)),
            frozenset().union(*(images for *_, images, _ in ranks)),
            self._shapes,
            weights,
            biases,
            drift if self._training else self._drift_of_evaluation(merged, statistics),
            _summed(found for _, found, *_ in ranks),
            updates,
        )
        sample = self._builder.build(found, None if reference is None else reference._builder)
        self._readings.clear()
        self._is_open = False
        return sample

    @property
    def can_keep(self) -> bool:
        """Whether samples may be `kept`: they are of norms alone, and no other rank takes part."""
        return self._training and not (self._activations or self._gradients or self._ranks.are_several)

    def keep(self) -> None:
        """Let the sample wait, on its device, in `kept`."""
        affine = self.measure()[2:4]
        if self._meter is not None:
            self.kept.add(self._meter, self._shapes, affine, self._readout)
        self._is_open = False

    def close(self) -> None:
        """Remove the hooks, and whatever else was placed; a sample that was begun is given up."""
        self.detach()
        if self._meter is not None:
            self._meter.close()
        self._is_open = False

    @torch.no_grad()
    def measure(self) -> list[Tensor]:
        """Return all that was measured, still on the device, for one transfer; waits for nothing."""
        self._readings.put_together()
        self._hand_in()
        widths, parameters = tuple(map(_WIDTH, self._norms.values())), affine_of(self._norms.values())
        self._shapes = NormShapes(widths, *(tuple([isinstance(p, Tensor) for p in each]) for each in parameters))
        affine = [joined(full_vectors(each, widths)) for each in parameters]
        self._readout = Readout([], [], [])
        if self._meter is not None and self._is_open:
            self._readout = self._meter.readout() if self._training else Readout(self._meter.statistics(), [], [])
        pool = self._readings.pool
        pooled = [torch.empty(4, 0), torch.empty(3, 0)] if pool is None else [pool.channels, pool.layers]
        return [*pooled, *self._readings.sums.values(), *affine, self._updates.measure(), *self._readout.tensors]

    def _hand_in(self) -> None:
        """Tell the drift meter what the layers were given whose buffers don't tell."""
        if not self._training or self._meter is None or self._readings.pool is None or not self._observed:
            return
        indices = {name: index for index, name in enumerate(self._tracking)}
        self._meter.hand_in(
            (indices[key.place.path], values[1], values[2] / (values[0] - 1))
            for key, values in zip(self._readings.pool.keys, self._readings.pool.split(), strict=True)
            if key.what == "input"
        )

    def _drift_of_evaluation(self, pool: Pool | None, statistics: list[Tensor]) -> Drift | None:
        if self._meter is None or not statistics:
            return None
        indices = {name: index for index, name in enumerate(self._tracking)}
        inputs: dict[int, tuple[Array, Array]] = {}
        if pool is not None:
            for key, part in zip(pool.keys, pool.split(), strict=True):
                if key.what == "input":
                    count, mean, m2, _ = part.double().numpy()
                    with silent_numbers():
                        inputs[indices[key.place.path]] = mean, m2 / (count - 1)
        return self._meter.against(statistics, inputs)

    @guarded
    def _see(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        self._sites.resume_functions()
        if not self._is_attached or is_extra_pass():
            return
        # A subclass may have its own idea of what its values are.
        is_plain = not kwargs and type(output) in _PLAIN and _PLAIN.issuperset(map(type, args))
        with unseen_by_modes() if is_plain else nullcontext():
            self._see_output(name, args, kwargs, output)

    def _see_output(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        tensor = first_float(output)
        if tensor is None:
            self._leave_out_if_unreadable(name, output)
            return
        other_set, is_again = self._sets.of(self.layers[name]), in_backward()
        given = first_float(args)
        given = first_float(kwargs) if given is None and kwargs else given
        place = self._sites.of(name, given, other_set, is_again=is_again)
        if self._gradients and tensor.requires_grad:
            # Also in a recomputation: with reentrant checkpointing its graph is the one that backward goes through.
            tensor.register_hook(partial(self._see_gradient, name, place))
        if is_again:
            return
        self._called.add(name)
        self._see_activation(name, place, tensor)
        if name in self._observed and other_set is None and given is not None:
            self._readings.take("input", name, CallSite(name, 1), given)

    def _see_activation(self, name: str, place: CallSite, tensor: Tensor) -> None:
        if self._readings.take("activation", name, place, tensor) is not None:
            self._newest = [(place, ref(tensor))]

    @guarded
    def _see_function(self, name: str, place: CallSite, tensor: Tensor) -> None:
        if not self._is_attached or is_extra_pass() or not tensor.is_floating_point():
            return
        if self._gradients and tensor.requires_grad:
            tensor.register_hook(partial(self._see_gradient, name, place))
        if not in_backward():
            self.sees_functions = True
            self._see_activation(name, place, tensor)

    @guarded
    def _see_gradient(self, name: str, place: CallSite, gradient: Tensor) -> None:
        if self._is_attached:
            self._readings.take("gradient", name, place, gradient)

    def _see_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take in what the model is given, the first tensor of a batch."""
        if self._is_given or not self._is_attached or is_extra_pass():
            return
        given = next(float_tensors((args, kwargs), with_bytes=True), None)
        if given is None:
            return
        self._is_given = True
        given = given.float() if given.dtype == torch.uint8 else given
        place = CallSite(INPUT if INPUT not in self.layers else f"({INPUT})", 1)
        key = self._readings.take("given", place.path, place, given)
        # Where the channels come last they are features, of which a batch may well have one value alone.
        if key is not None and given.dim() > 2 and self._readings.axis.of(place.path, given) == 1:
            self._images |= {key}

    def _see_result(self, result: Any) -> None:
        """Take note of whether the activation that came last is what the model returns."""
        for place, activation in self._newest:
            if any(tensor is activation() for tensor in float_tensors(result)):
                self._outputs |= {place}

    def _leave_out_if_unreadable(self, name: str, output: Any) -> None:
        if in_backward():
            return
        self._called.add(name)
        if isinstance(output, Tensor):
            self._readings.left_out.setdefault(name, str(output.dtype).removeprefix("torch."))


def _summed(counts: Iterable[dict[_Summand, Tensor]]) -> dict[_Summand, Tensor]:
    together: dict[_Summand, Tensor] = {}
    for found in counts:
        for key, values in found.items():
            together[key] = together[key] + values if key in together else values
    return together
