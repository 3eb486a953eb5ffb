"""The one place where this package touches parts of Lightning that are not public.

Each function says why nothing public will do. They were written against Lightning 2.6; where one of these parts is
gone, the function raises an error that says so and names the argument which does without it, before anything is
changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, get_args

from lightning.fabric.utilities.data import sized_len
from torch import Tensor

from lightning_bn.callbacks.both_lightnings import (
    Callback,
    CombinedLoader,
    LightningModule,
    ModelParallelStrategy,
    TensorBoardLogger,
    Trainer,
    package_of,
)
from lightning_bn.recalibration.kept_objects import keeps_position_in_shared_memory
from lightning_bn.sharding import is_fsdp1
from lightning_bn.torch_internals import second_loader

_LOG_METRICS = [each.log_metrics for each in get_args(TensorBoardLogger)]
_NO_VALIDATION = "leave out CompareAverages, or monitor="


def logs_tags_as_they_are(logger: TensorBoardLogger) -> bool:
    """Tell whether a TensorBoardLogger writes each number under the tag that it is given, so that all can be written at
    once: it has no prefix, which has no public name, and no ``log_metrics`` of its own. Where the name is gone the
    answer is False, and each number is written by itself."""
    return getattr(logger, "_prefix", None) == "" and type(logger).log_metrics in _LOG_METRICS


def logging_step(trainer: Trainer) -> int:
    """Return the step under which Lightning's own logger calls file what happens now.

    It differs from the public ``trainer.global_step`` with several optimizers, and curves would not line up.
    """
    epoch_loop = getattr(trainer.fit_loop, "epoch_loop", None)
    return int(getattr(epoch_loop, "_batches_that_stepped", trainer.global_step))


def batch_to_device(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """Take a loader's batch through the precision plugin's conversion, all transfer hooks, and onto the module's
    device.

    ``on_before_batch_transfer`` may be the module's or the datamodule's; only
    `LightningModule._on_before_batch_transfer` knows which.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, device=module.device, dataloader_idx=0)


def training_loader(trainer: Trainer) -> CombinedLoader:
    """Return the Trainer's training data anew, with its samplers and limits, so that a pass over it leaves the running
    one alone.

    ``trainer.train_dataloader`` is public, but neither the mode in which several loaders are combined nor
    ``limit_train_batches`` in batches is.
    """
    live = _reach(trainer, "fit_loop._combined_loader", "pass BatchNormRecalibration(dataloader=...)")
    return _anew(live)


def why_no_second_pass(trainer: Trainer) -> str | None:
    """Return what the training loader is or has, where a second pass over it would disturb the running one."""
    live = getattr(trainer.fit_loop, "_combined_loader", None)
    for loader in () if live is None else live.flattened:
        if isinstance(loader, Iterator):
            return "is its own iterator, so a second pass would take the fit's batches"
        if keeps_position_in_shared_memory(loader):
            name = type(loader.dataset).__name__
            return f"reads a {name}, whose position is in shared memory, so a second pass would move the fit's"
    return None


def afresh(loader: Any) -> Any:
    """Return a loader of the user's that can be iterated while another one is running: a `DataLoader` or
    `CombinedLoader` is copied."""
    return _anew(loader) if isinstance(loader, CombinedLoader) else second_loader(loader)


# By a combined loader's mode, its length from theirs.
_COMBINING = {"min_size": min, "max_size": max, "max_size_cycle": max, "sequential": sum}


def number_of_batches(loader: Any) -> int:
    """Return how many batches a loader has; a `CombinedLoader` raises where it is asked before it is iterated, and the
    mode in which it combines its loaders is not public.

    Raises:
        TypeError: nobody knows.
    """
    if not isinstance(loader, CombinedLoader):
        return len(loader)
    combine: Any = _COMBINING.get(getattr(loader, "_mode", ""))
    if combine is None:
        raise TypeError("the loader does not say how it combines its loaders")
    lengths = [math.inf if (length := sized_len(each)) is None else length for each in loader.flattened]
    limits = loader.limits or [math.inf] * len(lengths)
    total = combine(map(min, lengths, limits))
    if math.isinf(total):
        raise TypeError("the loader has no length")
    return int(total)


def validation_loader(trainer: Trainer) -> CombinedLoader:
    """Return the fit's validation data anew; see `training_loader`. The Trainer is to be in the validating stage."""
    live = _reach(trainer, "fit_loop.epoch_loop.val_loop", _NO_VALIDATION)
    live.setup_data()  # where the fit has not validated yet
    return _anew(_reach(trainer, "fit_loop.epoch_loop.val_loop._combined_loader", _NO_VALIDATION))


def validation_metrics(trainer: Trainer, loader: CombinedLoader) -> dict[str, Tensor]:
    """Run the fit's validation once more, on `loader`, and return what it would have put into
    ``trainer.callback_metrics``.

    A second loop of Lightning's own class takes the place of the first, with a metric store of its own: the same hooks,
    reductions and names, but no callback or logger hears of it, and no progress counter, checkpoint or logged value
    changes. ``trainer.validate`` can't be called inside ``fit``, and writing the loop anew would give other metrics in
    a dozen corners.
    """
    epoch_loop = _reach(trainer, "fit_loop.epoch_loop", _NO_VALIDATION)
    live, connector = epoch_loop.val_loop, _reach(trainer, "_logger_connector", _NO_VALIDATION)
    again = type(live)(trainer, live._trainer_fn, live._stage, verbose=False, inference_mode=live.inference_mode)
    again._combined_loader, again._max_batches = loader, live._max_batches
    again._last_val_dl_reload_epoch = trainer.current_epoch
    with ExitStack() as stack:
        for owner, name, value in (
            (epoch_loop, "val_loop", again),
            (trainer, "_logger_connector", type(connector)(trainer)),
            (trainer, "_last_val_time", getattr(trainer, "_last_val_time", None)),
            (trainer, "callbacks", _deaf_progress_bar(trainer)),
            (trainer, "loggers", []),
            (trainer, "profiler", package_of(trainer).profilers.PassThroughProfiler()),
        ):
            stack.enter_context(exchanged(owner, name, value))
        stack.callback(again.teardown)
        again.run()
        return {name: value.detach().clone() for name, value in trainer.callback_metrics.items()}


def layer_sync_of(trainer: Trainer) -> Any:
    """Return the plugin of `Trainer(plugins=...)` that is to synchronise layers, None if there is none.

    Nothing public says which plugins a Trainer was given. Where this is gone, a plugin that no strategy applies goes
    unnoticed.
    """
    return getattr(getattr(trainer, "_accelerator_connector", None), "_layer_sync", None)


def inside_wrapper(
    trainer: Trainer, module: LightningModule, run: Callable[[LightningModule, Any], Any], batch: Any
) -> None:
    """Call ``run(module, batch)``; under FSDP 1 inside of a forward of the wrapper, since the parameters are there
    inside of it alone.

    As Lightning's own strategies do for a step, with a part of them that is not public.
    """
    wrapper = trainer.strategy.model
    if wrapper is None or not is_fsdp1(wrapper):
        run(module, batch)
        return
    own = vars(module).get("forward")

    def forward(batch: Any) -> None:
        _put_back()
        run(module, batch)

    def _put_back() -> None:
        if own is None:
            vars(module).pop("forward", None)
        else:
            vars(module)["forward"] = own

    vars(module)["forward"] = forward
    try:
        wrapper(batch)
    finally:
        _put_back()


def data_parallel_group(trainer: Trainer) -> Any:
    """Return the process group of the ranks that see different data, of which this is one; None for that of all ranks.

    They are not all ranks where the strategy divides a layer between some of them, which then see the same batch. The
    name of the mesh's dimension stands in the documentation of `ModelParallelStrategy`.
    """
    mesh = (
        getattr(trainer.strategy, "device_mesh", None) if isinstance(trainer.strategy, ModelParallelStrategy) else None
    )
    return None if mesh is None else mesh["data_parallel"].get_group()


def _deaf_progress_bar(trainer: Trainer) -> list[Callback]:
    """Return the Trainer's progress bar, if it has one, as a callback that hears of nothing.

    A rich bar is drawn by a thread of its own, which looks for it among ``trainer.callbacks`` and dies where it is
    gone.
    """
    bar = trainer.progress_bar_callback
    if bar is None:
        return []
    hooks = [name for name in dir(Callback) if name.startswith("on_") or name in ("setup", "teardown")]
    deaf: Callback = object.__new__(type(type(bar).__name__, (type(bar),), dict.fromkeys(hooks, nothing)))
    deaf.__dict__ = bar.__dict__
    return [deaf]


def nothing(*args: Any, **kwargs: Any) -> None:
    """Take whatever a hook or a logging method takes."""


@contextmanager
def exchanged(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let an attribute have another value for the block."""
    before = getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _reach(trainer: Trainer, path: str, advice: str) -> Any:
    part: Any = trainer
    for name in path.split("."):
        part = getattr(part, name, None)
    if part is None:
        raise RuntimeError(
            f"trainer.{path} is missing: Lightning {package_of(trainer).__version__} is not supported here; {advice} "
            f"to do without it."
        )
    return part


def _anew(live: CombinedLoader) -> CombinedLoader:
    fresh = type(live)(live.iterables, live._mode)
    fresh.flattened = [second_loader(loader) for loader in live.flattened]
    fresh.limits = live.limits
    return fresh
