"""Whether the test of running statistics tells honest fits from mistakes, and speaks where they cost accuracy.

Networks of three kinds are fitted on digits, in honest situations and with mistakes, with several seeds. What an
evaluation *loses* is what a recalibration from the training images, with the weights that it evaluates, would gain, on
images held out. The second table says which limit on the effect finds how many of these, in each half of the seeds: one
half fixes it, the other judges.

    python benchmarks/fit_test.py [FIRST SEED] [LAST SEED]

The first table alone, of whole fits, by what the rules of whichever version is imported say above information, one
without this test too:

    PYTHONPATH=THAT_VERSION python benchmarks/fit_test.py [FIRST SEED] [LAST SEED] rules
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from split_digits import HELD_OUT, TRAIN
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import ModeCheck, recalibrate

try:
    from lightning_bn.rules import fit
    from lightning_bn.rules.fit_test import LEAST_BATCHES, FitTest
    from lightning_bn.rules.replay import FEW_CHANGE
except ImportError:
    fit, LEAST_BATCHES = None, 30  # type: ignore[assignment, misc]

CODES = ("BN204", "BN207", "BN208")
LIMITS = (0.1, 0.15, 0.2, 0.3, 0.5)
LOSSES = ("under 2", "2 to 5", "5 to 10", "10 or more")  # points
BOUNDS = (0.02, 0.05, 0.10)


def network(kind: str, momentum: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    if kind == "perceptron":
        for inside, outside in pairwise((64, 48, 48, 32)):
            layers += [nn.Linear(inside, outside), nn.BatchNorm1d(outside, momentum=momentum), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(32, 10))
    for inside, outside in pairwise((1, 8, 16, 16) if kind == "three norms" else (1, 8, 8, 16, 16, 16, 16)):
        norm = nn.BatchNorm2d(outside, momentum=momentum)
        layers += [nn.Conv2d(inside, outside, 3, padding=1, bias=False), norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


class Fit(pl.LightningModule):
    """The weights are multiplied for a validation by `factor`, as an exchange does, and its images by `scale`."""

    def __init__(
        self, kind: str, *, lr: float = 0.05, momentum: float = 0.1, factor: float = 1.0, scale: float = 1.0,
        adam: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.lr, self.factor, self.scale, self.adam = lr, factor, scale, adam
        self.model = network(kind, momentum)
        self.norms = [each for each in self.model if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d)]
        self.losses: list[float] = []  # of each validation, as a share of the images

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def on_validation_start(self) -> None:
        self._multiply(self.factor)

    def on_validation_end(self) -> None:
        self._multiply(1 / self.factor)

    def _multiply(self, factor: float) -> None:
        for parameter in self.model.parameters():
            parameter.data.mul_(factor)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if batch_idx == 0:
            mended = copy.deepcopy(self.model)
            recalibrate(mended, [TRAIN.tensors[0]], layers="all", progress=False)
            self.losses.append(right(mended.eval()) - right(self.model))
        self.model(batch[0] * self.scale)

    def configure_optimizers(self) -> Any:
        if self.adam:
            return torch.optim.Adam(self.parameters(), lr=self.lr)
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def right(model: nn.Module) -> float:
    images, labels = HELD_OUT.tensors
    with torch.no_grad():
        return (model(images).argmax(1) == labels).double().mean().item()


class Reset(Fit):
    """One layer's statistics are reset before each validation."""

    def on_validation_start(self) -> None:
        self.norms[1].reset_running_stats()


class ResetVariance(Fit):
    def on_validation_start(self) -> None:
        self.norms[1].running_var.fill_(1)  # type: ignore[union-attr, operator]


class Frozen(Fit):
    """The layers run in eval mode in training, with statistics that are not the data's."""

    def on_fit_start(self) -> None:
        for layer in self.norms:
            layer.eval()
            layer.running_mean += 0.5  # type: ignore[operator]


class Situation(NamedTuple):
    make: Callable[[str], Fit]
    callbacks: Callable[[], list[pl.Callback]] = list
    batch_size: int = 32


def with_options(**options: Any) -> Callable[[str], Fit]:
    return lambda kind: Fit(kind, **options)


def averaged(decay: float, **options: Any) -> Callable[[], list[pl.Callback]]:
    return lambda: [EMAWeightAveraging(decay=decay, **options)]


HONEST = {
    "plain": Situation(Fit),
    "rate 0.002": Situation(with_options(lr=0.002)),
    "rate 0.15": Situation(with_options(lr=0.15)),
    "rate 0.3": Situation(with_options(lr=0.3)),
    "momentum 0.02": Situation(with_options(momentum=0.02)),
    "momentum 0.02, rate 0.01": Situation(with_options(momentum=0.02, lr=0.01)),
    "momentum 0.05": Situation(with_options(momentum=0.05)),
    "batches of 8": Situation(Fit, batch_size=8),
    "batches of 128": Situation(Fit, batch_size=128),
    "Adam, rate 0.01": Situation(with_options(lr=0.01, adam=True)),
    "Adam, rate 0.03": Situation(with_options(lr=0.03, adam=True)),
    "EMA .9, buffers": Situation(Fit, averaged(0.9, use_buffers=True)),
    "EMA .9, parameters": Situation(Fit, averaged(0.9, use_buffers=False)),
    "eval mode in training": Situation(Frozen),
    "darker images in validation": Situation(with_options(scale=0.3)),
}
MISTAKES = {
    "weights times 2": Situation(with_options(factor=2.0)),
    "weights times 4": Situation(with_options(factor=4.0)),
    "EMA .999, buffers": Situation(Fit, averaged(0.999, use_buffers=True)),
    "EMA .99, parameters, rate 0.2": Situation(with_options(lr=0.2), averaged(0.99, use_buffers=False)),
    "momentum 0.001": Situation(with_options(momentum=0.001)),
    "one layer reset": Situation(Reset),
    "one layer's variance reset": Situation(ResetVariance),
}


class Judged(NamedTuple):
    """One evaluation, of at least `LEAST_BATCHES` training batches."""

    seed: int
    loss: int
    """Index into `LOSSES`."""
    effect: float
    """The largest lower bound of any layer's."""
    changed: float
    """Share of answers; 0 where the batch was not run again, or no layer is off in it."""
    told: bool = False
    """Whether a rule has spoken of it above information."""

    def said(self, limit: float) -> bool:
        return self.effect > limit and self.changed > FEW_CHANGE


def judged(situation: Situation, kind: str, seed: int) -> list[Judged]:
    """Return every evaluation of a fit; the largest batch that was seen is run again wherever anything is off."""
    found: list[tuple[float, float]] = []
    take, before = FitTest._take, fit.NOTICEABLE

    def noting(self: FitTest, noticed: Mapping[int, fit.Effect], replayed: Any) -> None:
        take(self, noticed, replayed)
        found[-1] = (max(each.lower for each in noticed.values()), (replayed.changed or 0) * bool(self.result.layers))

    FitTest._take, fit.NOTICEABLE = noting, min(LIMITS)  # type: ignore[method-assign]
    try:
        evaluations = told(situation, kind, seed, lambda: found.append((0.0, 0.0)))
    finally:
        FitTest._take, fit.NOTICEABLE = take, before  # type: ignore[method-assign]
    found = found[len(found) - len(evaluations) :]  # the first may be of too few batches
    return [
        each._replace(effect=effect, changed=changed)
        for each, (effect, changed) in zip(evaluations, found, strict=True)
    ]


def told(situation: Situation, kind: str, seed: int, begins: Callable[[], object] = lambda: None) -> list[Judged]:
    """Return every evaluation of a fit that had batches enough, and whether rules spoke of it."""
    torch.manual_seed(seed)
    module, check = situation.make(kind), ModeCheck(action="log")

    class Begin(pl.Callback):
        def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            begins()
            steps.append(trainer.global_step)

    steps: list[int] = []
    trainer = pl.Trainer(
        max_epochs=3, callbacks=[*situation.callbacks(), check, Begin()], num_sanity_val_steps=0, logger=False,
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TRAIN, batch_size=situation.batch_size, shuffle=True), DataLoader(HELD_OUT, 100))
    spoken = {each.step for each in check.findings if each.code in CODES and each.level != "info"}
    return [
        Judged(seed, sum(lost >= bound for bound in BOUNDS), 0.0, 0.0, step in spoken)
        for lost, step in zip(module.losses, steps, strict=True)
        if step >= LEAST_BATCHES
    ]


def whole(evaluations: list[Judged]) -> list[Judged]:
    """Return the fit: what its worst evaluation loses, and whether a rule spoke of any (it speaks once of a cause)."""
    if not evaluations:
        return []
    return [max(evaluations, key=lambda each: each.loss)._replace(told=any(each.told for each in evaluations))]


def share(found: Iterable[Judged], limit: float | None) -> str:
    found = list(found)
    said = [each.told if limit is None else each.said(limit) for each in found]
    return f"{sum(said)} of {len(said)}" if said else ""


def main(first: int, last: int, *, rules: bool = False) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    what = "fits" if rules else "evaluations"
    print(f"| {what} that lose (points) | {' | '.join(LOSSES)} |\n|---|{'---:|' * len(LOSSES)}")
    everything: dict[str, list[Judged]] = defaultdict(list)
    limit = None if rules else fit.NOTICEABLE
    for title, situations in (("honest", HONEST), ("mistake", MISTAKES)):
        for name, situation in situations.items():
            found = [
                each
                for kind in ("three norms", "six norms", "perceptron")
                for seed in range(first, last)
                for each in (whole(told(situation, kind, seed)) if rules else judged(situation, kind, seed))
            ]
            everything[title] += found
            print(f"| {title}: {name} | {cells(found, limit)} |", flush=True)
        print(f"| **{title}, together** | {cells(everything[title], limit)} |", flush=True)
    if rules:
        return
    print(f"\n| limit, seeds | {' | '.join(LOSSES)} |\n|---|{'---:|' * len(LOSSES)}")
    for title, found in everything.items():
        for limit in LIMITS:
            for parity, half in enumerate(("even", "odd")):
                row = cells([each for each in found if each.seed % 2 == parity], limit)
                print(f"| {title}: {limit}, {half} | {row} |")


def cells(found: list[Judged], limit: float | None) -> str:
    return " | ".join(share((each for each in found if each.loss == loss), limit) for loss in range(len(LOSSES)))


if __name__ == "__main__":
    bounds = [int(each) for each in sys.argv[1:] if each != "rules"]
    main(*(bounds if len(bounds) == 2 else (0, bounds[0] if bounds else 3)), rules="rules" in sys.argv)
