"""The one place that talks to loggers: where their files lie, and how each takes a picture, a text or a file."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_bn.activations.heatmap import Pixels
from lightning_bn.activations.report import Sink
from lightning_bn.activations.tensorboard import TensorBoardSink, add_markdown, add_numbers
from lightning_bn.callbacks.both_lightnings import Logger, TensorBoardLogger, Trainer
from lightning_bn.callbacks.lightning_internals import logs_tags_as_they_are
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
    log_dir, save_dir = (getattr(logger, name, None) for name in ("log_dir", "save_dir"))
    # A log_dir that is the save_dir does not tell runs apart.
    if log_dir and str(log_dir) != str(save_dir):
        return str(log_dir)
    # Where Lightning puts the checkpoints of such a logger.
    return str(Path(save_dir) / str(logger.name or "") / str(logger.version or "")) if save_dir else None


def log_numbers(logger: Logger, numbers: Mapping[str, float], step: int) -> None:
    """Give numbers to a logger, by tag."""
    if (
        isinstance(logger, TensorBoardLogger)
        and logs_tags_as_they_are(logger)
        and add_numbers(logger.experiment, numbers, step)
    ):
        return
    logger.log_metrics(dict(numbers), step=step)


def log_markdown(loggers: Iterable[Logger], tag: str, text: str, step: int) -> None:
    """Write `text`, Markdown, to the loggers that show it."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            add_markdown(logger.experiment, tag, text, step)
        else:
            for sink in _other_sinks(logger):
                sink.text(tag, text, step)


def log_files(loggers: Iterable[Logger], files: Iterable[Path]) -> None:
    """Give files to the loggers that keep some with a run and show them."""
    files = list(files)
    for logger in loggers:
        for sink in _other_sinks(logger):
            sink.files(files)


def keeps_files(loggers: Iterable[Logger]) -> bool:
    """Tell whether a logger keeps files with a run."""
    return any(sink.keeps_files for logger in loggers for sink in _other_sinks(logger))


def sinks(loggers: Iterable[Logger], prefix: str) -> list[Sink]:
    """Return where each logger takes pictures and texts, for those that can."""
    found: list[Sink] = []
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            found.append(TensorBoardSink(logger.experiment, prefix))
        else:
            found += _other_sinks(logger)
    return found


def needs_pictures(loggers: Iterable[Logger]) -> bool:
    """Tell whether pictures show what nothing else does: in TensorBoard the page does, where it can be shown."""
    return plotly_file() is None or not all(isinstance(each, TensorBoardLogger) for each in loggers)


def _other_sinks(logger: Any) -> list[_Sink]:
    # By name, since Lightning imports a logger's own package when the logger is made, and SwanLab has its own.
    names = {each.__name__ for each in type(logger).__mro__}
    return [make(logger) for name, make in _SINKS.items() if name in names]


class _Sink:
    """A logger; what it has no place for the journal has."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    @property
    def keeps_files(self) -> bool:
        """Whether `files` keeps any."""
        return type(self).files is not _Sink.files

    def image(self, tag: str, pixels: Pixels, step: int) -> None:
        self.logger.log_image(key=tag, images=[pixels], step=step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        raise NotImplementedError

    def histogram(self, tag: str, counts: Tensor, step: int) -> None:
        """Nothing to do."""

    def files(self, files: Sequence[Path]) -> None:
        """Nothing to do, where a logger keeps none."""


class _Wandb(_Sink):
    def text(self, tag: str, markdown: str, step: int) -> None:
        import wandb

        # As Lightning's logger does, which gives no step: W&B drops what comes at an earlier one.
        shown = wandb.Html(f"<pre>{html.escape(markdown)}</pre>")
        self.logger.experiment.log({tag: shown, "trainer/global_step": step})

    def files(self, files: Sequence[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(f"lightning_bn-{self.logger.experiment.id}", type="batch-norm-report")
        for file in files:
            artifact.add_file(str(file), name=file.name)
        self.logger.experiment.log_artifact(artifact)


class _MLFlow(_Sink):
    def image(self, tag: str, pixels: Pixels, step: int) -> None:
        self.logger.experiment.log_image(self.logger.run_id, pixels, key=tag, step=step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        self.logger.experiment.log_text(self.logger.run_id, markdown, f"{tag}.md")

    def files(self, files: Sequence[Path]) -> None:
        for file in files:
            self.logger.experiment.log_artifact(self.logger.run_id, str(file), "lightning_bn")


class _Comet(_Sink):
    def image(self, tag: str, pixels: Pixels, step: int) -> None:
        self.logger.experiment.log_image(pixels, name=tag, step=step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        self.logger.experiment.log_text(markdown, step=step, metadata={"tag": tag})

    def files(self, files: Sequence[Path]) -> None:
        for file in files:
            self.logger.experiment.log_asset(str(file), file_name=f"lightning_bn/{file.name}")


class _SwanLab(_Sink):
    def text(self, tag: str, markdown: str, step: int) -> None:
        self.logger.log_text(tag, [markdown], step=step)


class _Aim(_Sink):
    def image(self, tag: str, pixels: Pixels, step: int) -> None:
        import aim

        self.logger.experiment.track(aim.Image(pixels), name=tag, step=step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        import aim

        self.logger.experiment.track(aim.Text(markdown), name=tag, step=step)

    @property
    def keeps_files(self) -> bool:
        """Whether the run has a store for files: where that is to be, only the user knows, who may name it later."""
        return self.logger.experiment.artifacts_uri is not None

    def files(self, files: Sequence[Path]) -> None:
        for file in files if self.keeps_files else ():
            # A store on another machine has it when the call returns: the page's folder goes away then.
            self.logger.experiment.log_artifact(str(file), f"lightning_bn/{file.name}", block=True)


_SINKS = {
    "AimLogger": _Aim,
    "WandbLogger": _Wandb,
    "MLFlowLogger": _MLFlow,
    "CometLogger": _Comet,
    "SwanLabLogger": _SwanLab,
}
