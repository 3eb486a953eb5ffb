"""The rules about how a model and its run are set up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging
from lightning_bn.discovery import BatchNormLayer, listing
from lightning_bn.layers.batch_norm import AveragedBatchNorm
from lightning_bn.layers.settlement import is_synchronised
from lightning_bn.layers.subclasses import has_attached_averaging
from lightning_bn.rules.arguments import Setting
from lightning_bn.rules.finding import Fix, Level
from lightning_bn.rules.fixes import each_of, group_norms
from lightning_bn.rules.rule import BatchRecord, Occasion, Rule, Seen

OF_KERAS = 0.9
"""BN301: momentum from which on it only makes sense as the weight of the old value, as in Keras (0.99) and TensorFlow
(0.9, 0.997)."""

SMALL_BATCH = 32
"""BN301: samples in a batch below which momentum 1, the last batch alone, makes poor statistics."""

FEW_VALUES = 16
"""BN302: values per channel below which batch statistics are poor. The relative standard error of a variance of n
values is ``sqrt(2 / (n - 1))``: 37 % at 16."""


MOST_REPLACED = 4
"""BN302: layers for which the fix shows how each is replaced by a group norm; for more it is a larger batch."""


class ExtremeMomentum(Rule):
    code = "BN301"
    title = "momentum 0, or 1 with a small batch, or above 0.5"
    why = (
        "momentum is the weight of the new batch: at 0 the statistics never move, at 1 they are those of the last "
        "batch alone."
    )

    def configuration(self, at: Occasion) -> Iterator[Seen]:
        names = [
            layer.name for layer in at.layers if layer.tracks and layer.module.training and momentum_of(layer) == 0
        ]
        if names:
            yield Seen(names, "momentum is 0.", fix=_with_momentum(at, names, 0.1, "to freeze a layer: layer.eval()"))
        large = {
            layer.name: momentum
            for layer in at.layers
            if 0.5 < (momentum := momentum_of(layer) or 0) < 1 and layer.tracks
        }
        if large:
            momentum = next(iter(large.values()))
            other = round(1 - momentum, 6)
            event = f"momentum is {momentum:g}. In Keras it is the weight of the old value: did you mean {other:g}?"
            # No momentum of torch's is that large; one between could be meant.
            level: Level = "warning" if momentum >= OF_KERAS else "info"
            yield Seen(list(large), event, level, _with_momentum(at, list(large), other))

    def batch(self, batch: BatchRecord) -> Iterator[Seen]:
        small = {}
        for layer, forwards in batch.by_layer().items():
            samples = max((f.samples for f in forwards if f.moved), default=SMALL_BATCH) * _ranks(layer, batch.setting)
            if momentum_of(layer) == 1 and samples < SMALL_BATCH:
                small[layer.name] = samples
        if small:
            yield Seen(
                list(small),
                f"{batch.when} momentum is 1 and the batch has {min(small.values())} samples (fewer than "
                f"{SMALL_BATCH}).",
                fix=_with_momentum(batch, list(small), 0.1),
            )


class FewValues(Rule):
    code = "BN302"
    title = "few values per channel in training"
    why = "so small a batch has a noisy mean and variance; the noise goes into the outputs and the running statistics."

    def batch(self, batch: BatchRecord) -> Iterator[Seen]:
        smallest: dict[BatchNormLayer, tuple[int, int]] = {}
        for layer, forwards in batch.by_layer().items():
            ranks = _ranks(layer, batch.setting)
            sizes = [(f.values * ranks, f.samples * ranks) for f in forwards if f.training]
            if sizes:
                smallest[layer] = min(sizes, key=lambda size: size[0])
        alone = {layer: size[0] for layer, size in smallest.items() if 1 in size}
        few = {layer.name: n for layer, (n, _) in smallest.items() if layer not in alone and 0 < n < FEW_VALUES}
        if alone:
            yield self._one_sample(batch, alone)
        if few:
            event = f"{batch.when} {min(few.values())} values per channel (fewer than {FEW_VALUES})."
            yield Seen(list(few), event, "info", Fix("a larger batch, or statistics over all devices", "advice"))

    def _one_sample(self, batch: BatchRecord, alone: dict[BatchNormLayer, int]) -> Seen:
        """One cause, one finding: some layers of a network still have a whole image to normalise, others one value."""
        single = [layer.name for layer, values in alone.items() if values == 1]
        event = f"a batch of one sample, {min(alone.values())} values per channel: it is normalised by itself in "
        event += "training, as by instance norm"
        if single:
            event = f"a batch of one sample: at {listing(single)} one value per channel has no variance: torch raises"
        if batch.largest > 1:
            event += f"; other batches have {batch.largest}"
            fix = Fix("drop_last=True", "in the training DataLoader")
        elif single or len(alone) > MOST_REPLACED:
            fix = Fix("batch_size=16", "in the training DataLoader", "any size above 1")
        else:
            channels = [(layer.name, layer.module.num_features) for layer in alone]
            fix = Fix(group_norms(batch.setting.root, channels, batch.model), note="or a larger batch")
        level: Level = "error" if single else "warning"
        return Seen([layer.name for layer in alone], f"{batch.when} {event}.", level, fix)


class BatchPerDevice(Rule):
    code = "BN304"
    title = "the statistics are those of one device's or one accumulation step's batch"
    level = "info"
    why = (
        "the gradient sees more samples than the normalisation does; a larger effective batch does not help batch norm."
    )

    def batch(self, batch: BatchRecord) -> Iterator[Seen]:
        setting = batch.setting
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
                fix=self._fix(setting, joined=all(_ranks(layer, setting) > 1 for layer in batch.by_layer())),
            )

    def _fix(self, setting: Setting, *, joined: bool) -> Fix:
        """Each cause has its own mend: nothing joins accumulated batches but a larger batch."""
        code, notes = [], []
        if setting.ranks > 1 and not joined:
            code.append("callbacks=[..., BatchNormSync()]")
            notes.append("or sync_batchnorm=True on GPUs")
        if setting.accumulated > 1:
            code.append("accumulate_grad_batches=1")
            notes.append(f"with a batch {setting.accumulated} times as large, where the memory allows it")
        return Fix(", ".join(code), "in the Trainer", "; ".join(notes))


def momentum_of(layer: BatchNormLayer) -> float | None:
    """Return the layer's momentum; None where its average has none."""
    averaging = getattr(layer.module, "averaging", None)
    return layer.module.momentum if averaging is None or hasattr(averaging, "momentum") else None


def _ranks(layer: BatchNormLayer, setting: Setting) -> int:
    """How many devices' batches the layer normalises with."""
    return setting.ranks if layer.synced or is_synchronised(layer.module) else 1


def _with_momentum(at: Occasion, names: Sequence[str], momentum: float, note: str = "") -> Fix:
    """The code that gives the layers `names` a momentum."""
    if len(names) == 1:
        return Fix(f"{at.path(names[0])}.momentum = {momentum:g}", note=note)
    return Fix(f"for layer in {each_of(at.setting.root, names, at.model)}: layer.momentum = {momentum:g}", note=note)


class Replaced(Rule):
    code = "BN308"
    title = "sync_batchnorm=True has replaced layers with an average or a class of their own"
    why = "the conversion makes new layers: an average is no longer called, and what a subclass does besides is gone."
    fix = Fix("callbacks=[..., BatchNormSync()]", "in the Trainer", "instead of sync_batchnorm=True")

    def configuration(self, at: Occasion) -> Iterator[Seen]:
        averaged = [layer.name for layer in at.layers if _holds_idle_averaging(layer.module)]
        if averaged:
            event = "{kind} holds an averaging that nothing calls: the layer that it was is gone."
            yield self._seen(averaged, event, at)
        classes: dict[type[nn.Module], list[str]] = {}
        for layer in at.layers:
            before = at.setting.classes.get(layer.name)
            if before is None or not layer.synced or layer.name in averaged:
                continue
            # A SyncBatchNorm does all that torch's class does, and Lightning's stand-in for it.
            is_torchs = before.__module__.startswith(("torch.", "lightning.", "pytorch_lightning."))
            if not is_torchs and not isinstance(layer.module, before):
                classes.setdefault(before, []).append(layer.name)
        for before, names in classes.items():
            yield self._seen(names, f"{before.__name__} has become {{kind}}.", at)

    def _seen(self, names: list[str], event: str, at: Occasion) -> Seen:
        kinds = dict.fromkeys(layer.kind for layer in at.layers if layer.name in names)
        return Seen(names, event.format(kind=", ".join(kinds)))


def _holds_idle_averaging(layer: _BatchNorm) -> bool:
    # The conversion keeps the children of a layer.
    works = isinstance(layer, AveragedBatchNorm) or has_attached_averaging(layer)
    return not works and any(isinstance(child, Averaging) for child in layer.children())
