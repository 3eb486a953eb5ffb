"""One more pass over the data, in which the network is as it runs at inference, for the spread of its layers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.buffers import running_mean, running_statistics
from lightning_bn.discovery import BatchNormLayer, find_batch_norms
from lightning_bn.ranks.collective import Group, Ranks
from lightning_bn.recalibration.feeding import Forward, all_else_kept, runner, with_the_weights_as_they_are
from lightning_bn.recalibration.image_moments import ImageReader
from lightning_bn.recalibration.measuring import normalises_its_input
from lightning_bn.recalibration.report import RecalibrationReport
from lightning_bn.recalibration.spread import DRAWS, LEAST_IMAGES, Spread, has_no_room, spread_of
from lightning_bn.recalibration.transaction import SpreadChange, commit
from lightning_bn.sharding import is_sharded, unwrapped
from lightning_bn.torch_internals import second_loader


def with_spread(
    report: RecalibrationReport,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    num_batches: int | None = None,
    device: torch.device | str | None = None,
    process_group: Group = None,
) -> RecalibrationReport:
    """Measure the spread of images at the layers that `report` tells of, and return it with what was kept; its
    ``rollback()`` undoes both.

    Args:
        report: of a `recalibrate` that was no dry run; likewise the arguments. Nothing is changed by a call that
            raises.
        model: with the new statistics.
        batches: to be read once more.
        forward: see `recalibrate`, as of what follows.
        num_batches: likewise.
        device: likewise.
        process_group: likewise.
    """
    core = unwrapped(model)
    check_whole(core)
    changed = {change.layer for change in report._changes}
    layers = [layer for layer in find_batch_norms(core) if layer.module in changed]
    ranks = Ranks(process_group, task="recalibrate(model, batches, spread=True)")
    run = runner(core, forward, device)
    with all_else_kept(core, batches) as tensors:
        changes, without = _measured_spreads(
            layers, ranks, islice(second_loader(batches), num_batches), with_the_weights_as_they_are(run, tensors)
        )
    commit(changes)
    images = max((change.new.images for change in changes), default=0)
    return replace(report, _changes=(*report._changes, *changes), spread_images=images, no_spread=without)


def check_whole(model: nn.Module) -> None:
    """Refuse a model whose parameters are spread over ranks, which run it in step.

    Raises:
        ValueError: with what to do instead.
    """
    if is_sharded(model):
        raise ValueError(
            "recalibrate(spread=True): the model's parameters are spread over the ranks (fully_shard, FSDP, tensor "
            "parallelism or DeepSpeed). Measure the spread on the whole model, loaded in one process: "
            "recalibrate(model, batches, spread=True, prior=float('inf')) leaves its statistics as they are."
        )


def _measured_spreads(
    layers: Sequence[BatchNormLayer], ranks: Ranks, batches: Iterable[Any], run: Callable[[Any], object]
) -> tuple[list[SpreadChange], tuple[str, ...]]:
    """Run every batch, and return the spread of each layer, bit-identical on all ranks, and which have none and why.

    Of more than `DRAWS` images as many are taken, each with the same chance. Every rank must call it.

    Args:
        layers: whose running statistics are the final ones; all modules are in eval mode.
        ranks: whose images are taken together.
        batches: of this rank.
        run: runs the model on one.
    """
    why = {place: reason for place, layer in enumerate(layers) if (reason := _why_not(layer))}
    asked = [place for place in range(len(layers)) if place not in why]
    reservoir = _Reservoir(-(-DRAWS // ranks.size), [layers[place].module for place in asked])
    with ranks.told(), ImageReader([layers[place].module for place in asked]) as reader:
        for batch in batches:
            reader.forget()
            run(batch)
            reservoir.add(reader)
    own = [reservoir.of(number) for number in range(len(asked))]
    spreads: dict[int, Spread] = {}
    measured_in = 0
    for place, parts in zip(asked, zip(*ranks.share(own), strict=True), strict=True):
        images = [part for part in parts if isinstance(part, _Images)]
        reasons = [part for part in parts if isinstance(part, str)]
        if len({part.calls for part in images}) > 1:
            reasons.append("it is called more often in some forwards than in others")
        number = sum(len(part.moments) for part in images)
        if images and number < LEAST_IMAGES:
            reasons.append(f"{number} images are too few, {LEAST_IMAGES} are needed")
        if reasons or not images:
            why[place] = next(iter(reasons), "it did not run")
        else:
            measured_in = measured_in or zlib.crc32(images[0].moments.numpy().tobytes())
            spreads[place] = _measured(layers[place], images, measured_in, ranks)
    changes = [
        SpreadChange(layers[place].module, spread_of(layers[place].module), new) for place, new in spreads.items()
    ]
    return changes, tuple(f"{layers[place].name or '(the model)'}: {why[place]}" for place in sorted(why))


def _why_not(layer: BatchNormLayer) -> str | None:
    if has_no_room(layer.module):
        return "it has an attribute 'spread' of its own"
    if not normalises_its_input(layer.module):
        return "its forward does not normalise its input as it comes"
    return None


def _measured(layer: BatchNormLayer, images: Sequence[_Images], measured_in: int, ranks: Ranks) -> Spread:
    """Return the spread of the images of all ranks."""
    device = running_mean(layer.module).device
    moments = torch.cat([part.moments for part in images])
    number = sum(part.number for part in images)
    spread = Spread(moments.shape[2], device)
    spread.measure(
        layer.module,
        moments.to(device),
        torch.stack([part.total for part in images]).sum(0) / number,
        all_images=number,
        calls=images[0].calls,
        measured_in=measured_in,
    )
    if ranks.are_several:
        # The same sums on other hardware may differ in the last bit: the first rank's decide.
        for name, value in ranks.broadcast({name: value.cpu() for name, value in spread.state().items()}, 0).items():
            spread.state()[name].copy_(value)
    return spread


class _Images(NamedTuple):
    moments: Tensor  # of the images that are held, (images, 2, C), on the CPU
    total: Tensor  # the sum of the moments of all images, (2, C), on the CPU, float64
    number: int  # of them
    calls: int  # of the layer, in one forward


class _Reservoir:
    """The moments of a random choice of the images that came, the same ones at every layer (Vitter 1985, algorithm R).

    Args:
        most: images to hold.
        layers: where they are read.
    """

    def __init__(self, most: int, layers: Sequence[_BatchNorm]) -> None:
        self._most = most
        self._layers = layers
        self._held: list[Tensor | None] = [None] * len(layers)
        self._totals: list[Tensor] = [torch.zeros((), dtype=torch.float64)] * len(layers)
        self._calls = [0] * len(layers)
        self._why: dict[int, str] = {}
        self._seen = 0
        self._generator = torch.Generator().manual_seed(0)

    def add(self, batch: ImageReader) -> None:
        """Take in the images of one forward; what is not finite at some layer is left out."""
        there: dict[int, Tensor] = {}
        for number, layer in enumerate(self._layers):
            found = batch.at(layer, self._calls[number] or None)
            if isinstance(found, str):
                self._why.setdefault(number, found)
            elif number not in self._why:
                self._calls[number] = batch.calls(layer)
                there[number] = found.standardised(*running_statistics(layer), layer.eps)
        if not there:
            return
        finite = torch.stack([each.isfinite().flatten(1).all(1).cpu() for each in there.values()]).all(0)
        valid = finite.nonzero().flatten()
        places, rows = self._places(valid)
        for number, moments in there.items():
            self._totals[number] = self._totals[number] + moments[valid.to(moments.device)].sum(0).cpu().double()
            held = self._held[number]
            if held is None:
                held = self._held[number] = torch.zeros(self._most, *moments.shape[1:])
            held[places] = moments[rows.to(moments.device)].to(held)

    def _places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return where to put which of `rows`."""
        numbers = torch.arange(self._seen, self._seen + len(rows))
        chosen = (torch.rand(len(rows), generator=self._generator, dtype=torch.float64) * (numbers + 1)).long()
        places = torch.where(numbers < self._most, numbers, chosen)
        self._seen += len(rows)
        last = {place: row for place, row in zip(places.tolist(), rows.tolist(), strict=True) if place < self._most}
        return torch.tensor(list(last), dtype=torch.int64), torch.tensor(list(last.values()), dtype=torch.int64)

    def of(self, number: int) -> _Images | str | None:
        """Return what is held of a layer, why nothing is, or None where no image came."""
        held = self._held[number]
        if number in self._why:
            return self._why[number]
        return (
            None
            if held is None
            else _Images(held[: min(self._seen, self._most)], self._totals[number], self._seen, self._calls[number])
        )
