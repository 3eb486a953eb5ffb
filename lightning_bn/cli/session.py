"""``lightning-bn recalibrate`` and ``lightning-bn validate``: a model, its data and a Trainer from a LightningCLI's
config, and passes over the data with the weights of a checkpoint."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch.cli
import pytorch_lightning.cli
import yaml
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor

from lightning_bn.callbacks.batch_input import BatchInput
from lightning_bn.callbacks.both_lightnings import (
    LIGHTNING_ADVICE,
    LIGHTNING_ERRORS,
    Callback,
    LightningModule,
    Trainer,
    set_callbacks,
)
from lightning_bn.callbacks.checkpoint_files import statistics_in
from lightning_bn.callbacks.conversion import ConvertBatchNorm
from lightning_bn.callbacks.lightning_internals import validation_loader
from lightning_bn.callbacks.recalibrated_sets import Sources
from lightning_bn.callbacks.training_pass import in_stage
from lightning_bn.checkpoints.atomic_file import write_atomically
from lightning_bn.checkpoints.reading import CheckpointRefusedError, read_checkpoint
from lightning_bn.cli.output import OK, RefusedError, UsageError, print_json, print_table
from lightning_bn.discovery import find_batch_norms
from lightning_bn.recalibration import recalibrate
from lightning_bn.recalibration.measuring import normalising_with_batches
from lightning_bn.recalibration.report import RecalibrationReport
from lightning_bn.recalibration.selection import choose

# What a run of training would do beside what is asked for here; its callbacks are left out below. `fit` stops before
# its first batch.
_QUIET: dict[str, Any] = {
    "logger": False,
    "num_sanity_val_steps": 0,
    "fast_dev_run": False,
    "profiler": None,
    "max_epochs": 1,
    "max_steps": -1,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "val_check_interval": None,
    "check_val_every_n_epoch": 1,
}

_PARSER = {
    "prog": "lightning-bn",
    "usage": "lightning-bn COMMAND --config CONFIG --ckpt_path CKPT -- [options of your LightningCLI]",
}


def load_checkpoint(path: Path, *, weights_only: bool) -> dict[str, Any]:
    """Load a Lightning checkpoint."""
    try:
        checkpoint = read_checkpoint(path, weights_only=weights_only)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    except CheckpointRefusedError as error:
        raise RefusedError(f"{error} If you trust the file, pass --weights_only false.") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise RefusedError(f"{path} is not a Lightning checkpoint: it has no state_dict.")
    return checkpoint


class Session:
    """What a config describes, quiet: no logger, no file, and of its callbacks `ConvertBatchNorm` alone.

    Args:
        options: of the command line: `config`, `overrides`, `model`, `data` and `cli`.
        checkpoint: whose weights the passes run with.
    """

    def __init__(self, options: Namespace, checkpoint: dict[str, Any]) -> None:
        for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        built = _build(options.config, options.overrides, options.model, options.data, options.cli)
        self.trainer: Trainer = built.trainer
        self._module: LightningModule = built.model
        self._datamodule = built.datamodule
        self._checkpoint = checkpoint
        of_module = self._module.configure_callbacks
        self._module.configure_callbacks = lambda: _converting(of_module())
        self._callbacks = _converting(built.trainer.callbacks)

    def recalibrate(
        self, options: Namespace, *, dry_run: bool = False
    ) -> tuple[RecalibrationReport, dict[str, Tensor]]:
        """Recalibrate the model with the checkpoint's weights; return the report, and the statistics by their keys in
        the checkpoint."""
        state: dict[str, Tensor] = self._checkpoint["state_dict"]
        how = {name: getattr(options, name) for name in ("num_batches", "tolerance", "exact")}
        # A bar of many lines in a log file tells nobody anything.
        how |= {"progress": sys.stderr.isatty(), "dry_run": dry_run}
        run = _Recalibration(options.dataloader, options.layers, options.set, how)
        self._run(self.trainer.fit, {}, run)
        if run.report is None:
            raise RefusedError("the config has no training data, without which Lightning does not fit.")
        unknown = [key for key in run.statistics if key not in state]
        if unknown:
            raise RefusedError(
                f"the model renames what it loads: its {unknown[0]} is not in the checkpoint, so there is no place for "
                f"it."
            )
        return run.report, {key: value.to(state[key].dtype) for key, value in run.statistics.items()}

    def validate(self, statistics: dict[str, Tensor], *, with_batches: bool = False) -> dict[str, float]:
        """Return the metrics that validation logs with the checkpoint's weights; `statistics` go in the place of its
        own."""
        extra = [_BatchStatistics()] if with_batches else []
        results = self._run(partial(self.trainer.validate, verbose=False), statistics, *extra)
        return {name: float(value) for result in results for name, value in result.items()}

    def _run(self, start: Any, statistics: dict[str, Tensor], *extra: Callback) -> Any:
        weights = _Weights(self._checkpoint, statistics)
        set_callbacks(self.trainer, [*self._callbacks, weights, *extra])
        try:
            with warnings.catch_warnings():
                # Lightning's own use of torch's pytree; and its advice on the speed of training, which this is not.
                warnings.filterwarnings("ignore", message=".isinstance.treespec, LeafSpec.. is deprecated")
                for category in LIGHTNING_ADVICE:
                    warnings.filterwarnings("ignore", category=category)
                return start(self._module, datamodule=self._datamodule)
        except LIGHTNING_ERRORS as error:
            raise RefusedError(str(error)) from error


class _Weights(Callback):
    """Puts the checkpoint's weights in once the model is built, converted and on its device."""

    def __init__(self, checkpoint: dict[str, Any], statistics: dict[str, Tensor]) -> None:
        self._checkpoint = {**checkpoint, "state_dict": {**checkpoint["state_dict"], **statistics}}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.on_load_checkpoint(self._checkpoint)
        try:
            pl_module.load_state_dict(self._checkpoint["state_dict"], strict=pl_module.strict_loading)
        except RuntimeError as error:
            raise RefusedError(f"the checkpoint is not of the config's model. {error}") from error

    on_validation_start = on_fit_start


class _Recalibration(Callback):
    """Recalibrates where training would begin, and ends the fit there."""

    def __init__(
        self, dataloader: str, layers: Sequence[str] | None, set_name: str | None, options: dict[str, Any]
    ) -> None:
        self._dataloader = dataloader
        self._layers = layers
        self._set = set_name
        self._options = options
        self._input = BatchInput(
            None, call="lightning-bn", advice="Give the model a forward that takes it, or use lightning_bn.recalibrate."
        )
        self.report: RecalibrationReport | None = None
        self.statistics: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True
        loader = None
        if self._dataloader == "val":
            with in_stage(trainer, RunningStage.VALIDATING):
                loader = validation_loader(trainer)
        if self._set is None:
            sources = Sources(loader, None)
        else:
            sources = Sources(None, {self._set: loader}, call=f"lightning-bn --set {self._set}")

        def run(batches: Iterator[Any], layers: list[str]) -> RecalibrationReport:
            return recalibrate(
                pl_module,
                self._input.learn_from(trainer, pl_module, batches),
                forward=partial(self._input.run, trainer),
                layers=layers,
                device=pl_module.device,
                **self._options,
            )

        try:
            self.report = sources.recalibrated(trainer, pl_module, choose(pl_module, self._layers or None), run)
        except (TypeError, ValueError) as error:
            if not str(error).startswith("recalibrate("):
                raise
            raise RefusedError(str(error)) from error
        self.statistics = {key: value.detach().cpu().clone() for key, value in statistics_in(pl_module).items()}


class _BatchStatistics(Callback):
    """Lets every batch norm normalise with the batch during a validation; no running statistics move."""

    def __init__(self) -> None:
        self._undo = ExitStack()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = [layer.module for layer in find_batch_norms(pl_module) if layer.tracks]
        self._undo.enter_context(normalising_with_batches(layers))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._undo.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo.close()


def _build(
    configs: Sequence[Path], overrides: Sequence[str], model: str | None, data: str | None, cli: str | None
) -> Any:
    for path in configs:
        if not path.is_file():
            raise UsageError(f"--config {path}: there is no file {path}.")
    base = _cli_of(configs, model) if cli is None else _import(cli, "--cli")
    reader = type("Reader", (_Reading, base), {})
    arguments = [*(f"--config={path}" for path in configs), *overrides]
    classes = [
        None if path is None else _import(path, option) for path, option in ((model, "--model"), (data, "--data"))
    ]
    with warnings.catch_warnings():
        # It warns of arguments that are given to it beside those of the process: here those are another command's.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        # jsonargparse's own, of a Trainer without callbacks.
        warnings.filterwarnings("ignore", message=r"\s*Unable to serialize instance \[\]")
        try:
            built = reader(*classes, save_config_callback=None, run=False, args=arguments, parser_kwargs=_PARSER)
        except SystemExit as stop:
            if stop.code and model is None:
                print(
                    "lightning-bn: if your program is LightningCLI(Model, Data), pass --model and --data.",
                    file=sys.stderr,
                )
            raise
    return built


def _cli_of(configs: Sequence[Path], model: str | None) -> type[Any]:
    """Return the LightningCLI of the package that the model's class is from."""
    for path in (model, *(_model_in(config) for config in configs)):
        if path is not None:
            with suppress(ImportError, AttributeError, ValueError):  # what is wrong is told when the class is built
                if issubclass(_class_at(path), pytorch_lightning.LightningModule):
                    return pytorch_lightning.cli.LightningCLI
    return lightning.pytorch.cli.LightningCLI


def _model_in(config: Path) -> str | None:
    """Return the class path of the model in a config, which may be that of a subcommand."""
    with suppress(OSError, yaml.YAMLError):
        content = yaml.safe_load(config.read_text())
        for part in (content, *(content.values() if isinstance(content, dict) else ())):
            model = part.get("model") if isinstance(part, dict) else None
            if isinstance(model, dict) and isinstance(model.get("class_path"), str):
                return str(model["class_path"])
    return None


class _Reading:
    """What makes the Trainer of a LightningCLI quiet; a class in front of either package's."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        super().add_arguments_to_parser(parser)  # type: ignore[misc]
        for name in ("ckpt_path", "weights_only", "verbose", "return_predictions"):
            # The config of a subcommand such as fit has its arguments too; without a subcommand they would not be
            # known.
            parser.add_argument(f"--{name}", type=Any, default=None)

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()  # type: ignore[misc]
        for name, value in _QUIET.items():
            self.config[f"trainer.{name}"] = value  # type: ignore[attr-defined]


def _import(path: str, option: str) -> Any:
    try:
        return _class_at(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{option} {path}: {error}. It is the path of a class, as in package.module.Class.") from error


def _class_at(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _converting(callbacks: Any) -> list[Callback]:
    """Of one callback or several, those that make the model what it was in training."""
    return [
        each
        for each in (callbacks if isinstance(callbacks, Sequence) else [callbacks])
        if isinstance(each, ConvertBatchNorm)
    ]


def recalibrate_checkpoint(options: Namespace) -> int:
    """Write a checkpoint with running statistics that match its weights; all else in it is that of `ckpt_path`."""
    source: Path = options.ckpt_path
    target = options.output or source.with_name(f"{source.stem}-recalibrated{source.suffix}")
    checkpoint = load_checkpoint(source, weights_only=options.weights_only == "true")
    if not target.parent.is_dir():
        raise UsageError(f"there is no directory {target.parent} to write {target.name} into.")
    session = Session(options, checkpoint)
    # After the config, whose mistakes are of more interest than a file that is there.
    if not options.dry_run and target.exists() and not options.overwrite:
        raise RefusedError(f"{target} exists. Pass --output with another name, or --overwrite.")
    report, statistics = session.recalibrate(options, dry_run=options.dry_run)
    if not session.trainer.is_global_zero:
        return OK
    if not options.dry_run:
        checkpoint["state_dict"].update(statistics)
        write_atomically(checkpoint, target)
    if options.json:
        print_json({**report.as_dict(), "output": None if options.dry_run else str(target)})
    else:
        print(report)
        print("Nothing was written." if options.dry_run else f"Written: {target}")
    return OK


def validate_checkpoint(options: Namespace) -> int:
    """Validate a checkpoint under its own statistics and, to `compare`, under recalibrated ones and under the
    batches'."""
    checkpoint = load_checkpoint(options.ckpt_path, weights_only=options.weights_only == "true")
    session = Session(options, checkpoint)
    results = {"checkpoint": session.validate({})}
    if options.compare:
        _, statistics = session.recalibrate(options)
        results["recalibrated"] = session.validate(statistics)
        results["batch statistics"] = session.validate({}, with_batches=True)
    if session.trainer.is_global_zero and options.json:
        plain = {  # JSON has no NaN
            column: {name: value if math.isfinite(value) else None for name, value in row.items()}
            for column, row in results.items()
        }
        print_json(plain)
    elif session.trainer.is_global_zero:
        rows = [(name, *(f"{row[name]:.4g}" for row in results.values())) for name in results["checkpoint"]]
        print_table(("metric", *results), rows)
    return OK
