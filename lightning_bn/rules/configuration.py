"""The rules about how a model and its run are set up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from lightning_bn.discovery import BatchNormLayer
from lightning_bn.layers.settlement import is_synchronised
from lightning_bn.rules.adjacency import DeadBias, DropoutShift
from lightning_bn.rules.observer import Forward
from lightning_bn.rules.rule import Batch, Configuration, Level, Rule, Seen, Setting, listing

__all__ = ["CONFIGURATION_RULES"]

SMALL_BATCH = 32
"""BN301: samples in a batch below which momentum 1, the last batch alone, makes poor statistics."""

FEW_VALUES = 16
"""BN302: values per channel below which batch statistics are poor. The relative standard error of a variance of n values is
``sqrt(2 / (n - 1))``: 37 % at 16."""


class ExtremeMomentum(Rule):
    code = "BN301"
    title = "momentum 0, or 1 with a small batch"
    why = "momentum is the weight of the new batch: at 0 the statistics never move, at 1 they are those of the last batch alone."
    fix = "BatchNorm2d(channels, momentum=0.1)  # to freeze a layer: layer.eval()"

    def configuration(self, at: Configuration) -> Iterator[Seen]:
        names = [layer.name for layer in at.observer.layers if layer.tracks and layer.module.training and momentum_of(layer) == 0]
        if names:
            yield Seen(names, "momentum is 0.")

    def batch(self, batch: Batch) -> Iterator[Seen]:
        if not batch.training:
            return
        small = {}
        for layer, forwards in batch.by_layer().items():
            samples = max((f.samples for f in forwards if f.moved), default=SMALL_BATCH) * _ranks(layer, batch.setting)
            if momentum_of(layer) == 1 and samples < SMALL_BATCH:
                small[layer.name] = samples
        if small:
            yield Seen(
                list(small), f"{batch.when} momentum is 1 and the batch has {min(small.values())} samples (fewer than {SMALL_BATCH})."
            )


class FewValues(Rule):
    code = "BN302"
    title = "few values per channel in training"
    why = "the noise of so small a batch's mean and variance is part of what the layer computes, and of its statistics."

    def batch(self, batch: Batch) -> Iterator[Seen]:
        if not batch.training:
            return
        by_event: dict[tuple[Level, str, str], list[str]] = defaultdict(list)
        for layer, forwards in batch.by_layer().items():
            few = min((f for f in forwards if f.training), key=lambda f: f.values, default=None)
            judged = self._judge(layer, few, batch.setting) if few is not None else None
            if judged is not None:
                by_event[judged].append(layer.name)
        for (level, event, fix), names in by_event.items():
            yield Seen(names, f"{batch.when} {event}.", level=level, fix=fix)

    def _judge(self, layer: BatchNormLayer, few: Forward, setting: Setting) -> tuple[Level, str, str] | None:
        ranks = _ranks(layer, setting)
        samples, values = few.samples * ranks, few.values * ranks
        if values == 1:
            return "error", "one value per channel has no variance: torch raises", "DataLoader(..., drop_last=True)  # or a larger batch"
        if samples == 1:
            event = f"a batch of one sample: it normalises each by itself, as instance norm does in training, over {values} values"
            return "warning", event, f"nn.GroupNorm(32, {layer.module.num_features})  # or a larger batch"
        if 0 < values < FEW_VALUES:
            return "info", f"{values} values per channel (fewer than {FEW_VALUES})", "a larger batch, or statistics over all devices"
        return None


class BiasBeforeBatchNorm(Rule):
    code = "BN303"
    title = "a bias straight before a batch norm is dead weight"
    level = "info"
    why = "batch norm subtracts the mean, and with it whatever was added to all values of a channel: the bias has no gradient."

    def biases(self, biases: Sequence[DeadBias]) -> Iterator[Seen]:
        if biases:
            names = [each.bias for each in biases]
            yield Seen(
                [each.layer for each in biases],
                f"in the graph of the loss, {listing(names)} goes into a batch norm and nowhere else.",
                fix=f"bias=False where {names[0].rpartition('.')[0]} is built  # the batch norm has a bias of its own",
            )


class BatchPerDevice(Rule):
    code = "BN304"
    title = "the statistics are those of one device's or one accumulation step's batch"
    level = "info"
    why = "the gradient sees more samples than the normalisation does; a larger effective batch does not help batch norm."

    def batch(self, batch: Batch) -> Iterator[Seen]:
        setting = batch.setting
        if not batch.training:
            return
        alone = {
            layer.name: max(f.samples for f in forwards)
            for layer, forwards in batch.by_layer().items()
            if any(f.moved for f in forwards) and setting.ranks // _ranks(layer, setting) * setting.accumulated > 1
        }
        if alone:
            samples = max(alone.values())
            yield Seen(
                list(alone),
                f"normalised with {samples} samples; the gradient has {samples * setting.ranks * setting.accumulated} "
                f"({setting.ranks} devices, {setting.accumulated} accumulated batches).",
                fix="Trainer(sync_batchnorm=True) joins the devices; nothing joins accumulated batches but a larger batch",
            )


class DropoutBeforeBatchNorm(Rule):
    code = "BN305"
    title = "dropout straight before a batch norm"
    level = "info"
    why = "dropout raises the variance in training alone; in eval the layer divides by one its input does not have (Li et al. 2019)."

    def dropouts(self, dropouts: Sequence[DropoutShift]) -> Iterator[Seen]:
        if dropouts:
            first = dropouts[0]
            yield Seen(
                [each.layer for each in dropouts],
                f"behind {first.dropout} (p={first.p}) the variance was {first.ratio:.2f} times that before it.",
                fix="put the dropout behind the last batch norm, or recalibrate(model, batches) after training",
            )


def momentum_of(layer: BatchNormLayer) -> float | None:
    """Return the layer's momentum; None where its average has none."""
    averaging = getattr(layer.module, "averaging", None)
    return layer.module.momentum if averaging is None or hasattr(averaging, "momentum") else None


def _ranks(layer: BatchNormLayer, setting: Setting) -> int:
    """How many devices' batches the layer normalises with."""
    return setting.ranks if layer.synced or is_synchronised(layer.module) else 1


CONFIGURATION_RULES: tuple[Rule, ...] = (
    ExtremeMomentum(),
    FewValues(),
    BiasBeforeBatchNorm(),
    BatchPerDevice(),
    DropoutBeforeBatchNorm(),
)
