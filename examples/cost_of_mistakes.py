"""What mistakes cost: accuracy on the digits with each one, what ModeCheck says, and accuracy with the printed mend.

Run `python examples/cost_of_mistakes.py`; it prints the table of docs/rules.md, and with `--write docs/rules.md` puts
it there.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from digits import Classifier, ConvNet, digits, fit
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import BatchNormRecalibration, ModeCheck, convert_batch_norm, paused_statistics

Callbacks = Sequence[pl.Callback]
BEGIN, END = "<!-- cost_of_mistakes.py begins -->", "<!-- cost_of_mistakes.py ends -->"


class Mistake(NamedTuple):
    """A program with a mistake, and the same with the mend."""

    code: str
    what: str
    wrong: Callable[[], tuple[Classifier, Callbacks]]
    mended: Callable[[], tuple[Classifier, Callbacks]]
    shuffled: tuple[bool, bool] = (True, True)


def plain(*callbacks: pl.Callback, momentum: float | None = 0.1) -> tuple[Classifier, Callbacks]:
    module = Classifier(ConvNet())
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = momentum
    return module, callbacks


def in_eval() -> tuple[Classifier, Callbacks]:
    module, callbacks = plain()
    module.eval()
    return module, callbacks


class Samples(Classifier):
    """Runs noise through the model after each batch."""

    paused = False

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.run_noise()

    def run_noise(self) -> None:
        with torch.no_grad():
            if self.paused:
                with paused_statistics(self.model):
                    self.model(4 * torch.randn(32, 1, 8, 8))
            else:
                self.model(4 * torch.randn(32, 1, 8, 8))


class SamplesInStep(Samples):
    """Does so in the training step."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.run_noise()
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass


class Paused(Samples):
    paused = True


class PausedInStep(SamplesInStep):
    paused = True


class Overflows(Classifier):
    """One batch of infinities."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 3:
            self(torch.full_like(batch[0], float("inf")))
        return super().training_step(batch, batch_idx)


class Averages(Classifier):
    """Validates a copy whose weights are averaged, with or without the buffers."""

    def __init__(self, model: nn.Module, *, buffers: bool) -> None:
        super().__init__(model)
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.buffers_too = buffers

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) if self.training else self.ema(images)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        with torch.no_grad():
            for own, other in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                own.lerp_(other, 0.1)
            if self.buffers_too:
                for own, other in zip(self.ema.buffers(), self.model.buffers(), strict=True):
                    own.copy_(other)


def ema(decay: float, *, buffers: bool, mend: bool) -> tuple[Classifier, Callbacks]:
    recalibration = [BatchNormRecalibration(when="validation")] * mend
    return plain(EMAWeightAveraging(decay=decay, use_buffers=buffers), *recalibration)


MISTAKES = (
    Mistake("BN101", "`module.eval()` before `fit`", in_eval, plain),
    Mistake(
        "BN106",
        "noise run through the model under `no_grad`",
        lambda: (SamplesInStep(ConvNet()), ()),
        lambda: (PausedInStep(ConvNet()), ()),
    ),
    Mistake(
        "BN107",
        "noise run through the model between batches",
        lambda: (Samples(ConvNet()), ()),
        lambda: (Paused(ConvNet()), ()),
    ),
    Mistake(
        "BN203",
        "one batch of infinities",
        lambda: (Overflows(ConvNet()), ()),
        lambda: (Overflows(convert_batch_norm(ConvNet())), ()),
    ),
    Mistake(
        "BN207",
        "averaged weights of decay 0.995, buffers not averaged",
        lambda: ema(0.995, buffers=False, mend=False),
        lambda: ema(0.995, buffers=False, mend=True),
    ),
    Mistake(
        "BN207",
        "averaged weights and buffers of decay 0.995",
        lambda: ema(0.995, buffers=True, mend=False),
        lambda: ema(0.995, buffers=True, mend=True),
    ),
    Mistake(
        "BN208",
        "momentum 0.001",
        lambda: plain(momentum=0.001),
        lambda: plain(BatchNormRecalibration(when="validation"), momentum=0.001),
    ),
    Mistake(
        "BN209",
        "a copy with averaged weights and the buffers it began with",
        lambda: (Averages(ConvNet(), buffers=False), ()),
        lambda: (Averages(ConvNet(), buffers=True), ()),
    ),
    Mistake("BN301", "momentum 0", lambda: plain(momentum=0.0), plain),
    Mistake("BN307", "sorted by class, not shuffled", plain, plain, shuffled=(False, True)),
)


def loaders(*, shuffled: bool) -> tuple[DataLoader[Any], DataLoader[Any]]:
    train, validation = digits()
    if not shuffled:
        images, labels = train.dataset[:]
        order = labels.argsort(stable=True)
        train = DataLoader(TensorDataset(images[order], labels[order]), 32, drop_last=True)
    return train, validation


def measure(
    make: Callable[[], tuple[Classifier, Callbacks]], epochs: int, *, shuffled: bool
) -> tuple[float, list[str]]:
    """Return the accuracy of the last validation and the codes above information."""
    torch.manual_seed(0)
    module, callbacks = make()
    check = ModeCheck(action="log")
    fit(module, *loaders(shuffled=shuffled), epochs=epochs, callbacks=[*callbacks, check])
    accuracy = float(module.trainer.callback_metrics["val_acc"])
    return 100 * accuracy, sorted({finding.code for finding in check.findings if finding.level != "info"})


def table(epochs: int, chosen: Sequence[Mistake] = MISTAKES) -> str:
    """Return the Markdown table."""
    rows = ["| mistake | said | accuracy | mended |", "|---|---|---:|---:|"]
    for mistake in chosen:
        wrong, codes = measure(mistake.wrong, epochs, shuffled=mistake.shuffled[0])
        mended, rest = measure(mistake.mended, epochs, shuffled=mistake.shuffled[1])
        said = ", ".join(f"[{code}](#{code.lower()})" for code in codes) + (
            f" (mended: {', '.join(rest)})" if rest else ""
        )
        rows.append(f"| {mistake.what} | {said} | {wrong:.1f} % | {mended:.1f} % |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--write", type=Path, help="a page with the two marks between which the table goes")
    options = parser.parse_args()
    text = table(options.epochs)
    print(text)
    if options.write is not None:
        before, _, rest = options.write.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
