"""The one place that talks to loggers: where their files lie, and how each of them takes a picture or a text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_bn.activations.heatmap import Pixels
from lightning_bn.activations.report import Sink
from lightning_bn.activations.tensorboard import TensorBoardSink, add_markdown
from lightning_bn.callbacks.both_lightnings import Logger, TensorBoardLogger, Trainer
from lightning_bn.dashboard.assets import plotly_file


def directories(trainer: Trainer) -> list[Path]:
    """Return the directory of each logger that has one on this machine, else ``default_root_dir``; none for a
    ``fast_dev_run``, which leaves no files."""
    if getattr(trainer, "fast_dev_run", False):
        return []
    places = _places(trainer, trainer.loggers)
    return [Path(place) for place in dict.fromkeys(places) if "://" not in place]


def main_directory(trainer: Trainer) -> Path | None:
    """Return the one directory of a run: TensorBoard's, else another logger's, else ``default_root_dir``; None for one
    that is not on a disk of this machine."""
    loggers: list[Logger] = sorted(trainer.loggers, key=lambda each: not isinstance(each, TensorBoardLogger))
    found = _places(trainer, loggers)[0]
    return None if "://" in found else Path(found)


def _places(trainer: Trainer, loggers: Iterable[Logger]) -> list[str]:
    found = [place for logger in loggers if (place := _directory(logger)) is not None]
    return found or [str(trainer.default_root_dir)]


def _directory(logger: Any) -> str | None:
    if getattr(logger, "log_dir", None):
        return str(logger.log_dir)
    # Where Lightning puts the checkpoints of such a logger.
    save_dir = getattr(logger, "save_dir", None)
    return str(Path(save_dir) / str(logger.name or "") / str(logger.version or "")) if save_dir else None


def log_markdown(loggers: Iterable[Logger], tag: str, text: str, step: int) -> None:
    """Write `text`, Markdown, to the loggers that show it."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            add_markdown(logger.experiment, tag, text, step)


def sinks(loggers: Iterable[Logger], prefix: str) -> list[Sink]:
    """Return where each logger takes pictures, for those that can."""
    found: list[Sink] = []
    for logger in loggers:
        names = {each.__name__ for each in type(logger).__mro__}
        if isinstance(logger, TensorBoardLogger):
            found.append(TensorBoardSink(logger.experiment, prefix))
        else:
            # By name, since Lightning imports a logger's own package when the logger is made, and Neptune has its own.
            found += [make(logger) for name, make in _PICTURES.items() if name in names]
    return found


def needs_pictures(loggers: Iterable[Logger]) -> bool:
    """Tell whether pictures show what nothing else does: in TensorBoard the page does, where it can be shown."""
    return plotly_file() is None or not all(isinstance(each, TensorBoardLogger) for each in loggers)


class _Pictures:
    """A logger that takes pictures alone."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def image(self, tag: str, pixels: Pixels, step: int) -> None:
        raise NotImplementedError

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Nothing to do: the journal has it."""

    def histogram(self, tag: str, counts: Tensor, step: int) -> None:
        """Nothing to do: the journal has it."""


class _Wandb(_Pictures):
    def image(self, tag: str, pixels: Pixels, step: int) -> None:
        self.logger.log_image(key=tag, images=[pixels], step=step)


class _MLFlow(_Pictures):
    def image(self, tag: str, pixels: Pixels, step: int) -> None:
        self.logger.experiment.log_image(self.logger.run_id, pixels, key=tag, step=step)


class _Comet(_Pictures):
    def image(self, tag: str, pixels: Pixels, step: int) -> None:
        self.logger.experiment.log_image(pixels, name=tag, step=step)


class _Neptune(_Pictures):
    def image(self, tag: str, pixels: Pixels, step: int) -> None:
        from neptune.types import File

        self.logger.experiment[tag].append(File.as_image(pixels / 255.0), step=step)


_PICTURES = {"WandbLogger": _Wandb, "MLFlowLogger": _MLFlow, "CometLogger": _Comet, "NeptuneLogger": _Neptune}
