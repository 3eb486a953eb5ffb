"""Running statistics estimated anew, with the weights as they are."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_bn.discovery import BatchNormLayer, unsaved_by_adapter
from lightning_bn.modes import no_garbage_collected
from lightning_bn.ranks.collective import Group, Ranks
from lightning_bn.recalibration.collection import OnePass, merged
from lightning_bn.recalibration.feeding import Forward, all_else_kept, runner, with_the_weights_as_they_are
from lightning_bn.recalibration.measuring import measured
from lightning_bn.recalibration.outcome import Estimator, agreed_changes, layer_reports
from lightning_bn.recalibration.report import RecalibrationReport
from lightning_bn.recalibration.selection import Layers, choose, not_supported
from lightning_bn.recalibration.spread_pass import check_whole, with_spread
from lightning_bn.recalibration.transaction import StatisticsChange, commit
from lightning_bn.sharding import check_each_sees_its_own, check_not_distributed, is_sharded, unwrapped
from lightning_bn.torch_internals import second_loader

if TYPE_CHECKING:
    from lightning_bn.recalibration.exact import ExactPass

_CALL = "recalibrate(model, batches)"


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    num_batches: int | None = None,
    tolerance: float | None = None,
    prior: float = 0.0,
    pooled: bool = True,
    exact: bool = False,
    memory_budget: float | None = None,
    layers: Layers = None,
    device: torch.device | str | None = None,
    spread: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    process_group: Group = None,
) -> RecalibrationReport:
    r"""Estimate the running statistics of the batch-norm layers of `model` anew from data, with the weights as they
    are.

    ``running_mean`` and ``running_var`` become the mean and the variance of what each layer gets from the data. They
    are written in place, at the end, and nothing else is changed: not ``num_batches_tracked``, no mode, hook, momentum,
    gradient or random state (torch's, the accelerator's, numpy's, Python's, those in the loader). Whatever is raised on
    the way leaves the statistics as they were too; so does Ctrl-C, unless it comes after they are written. Gradients
    are off, and every layer is in eval mode, dropout too: the statistics are those of inference.

    Args:
        model: any module; layers of torch, of this package and any other subclass of ``_BatchNorm``. Of a
            ``DistributedDataParallel`` the module inside.
        batches: an iterable. A tensor goes into the model as it is, of a tuple or list the first element, a mapping as
            keyword arguments. An iterator is used up as far as it is read.
        forward: ``forward(model, batch)``, for any other call.
        num_batches: read at most that many, on each rank. None: all.
        tolerance: stop as soon as the standard error of every layer's mean, in units of its standard deviation (rms
            over channels), is below it, after 8 batches at the soonest. It is estimated from the spread between
            batches, since pixels of one image are not independent. It bounds what chance adds to the means, and not the
            cost: with batches of 4, 0.01 lost up to 1.8 points (docs/recalibration.md, "What a tolerance costs"). On
            several ranks each goes by its own batches.
        prior: number of samples (images, not pixels) that the present statistics count for. With n samples of data,
            ``mean = prior / (prior + n) * old + n / (prior + n) * data``, and likewise the variance: covariate shift
            adaptation (Schneider et al. 2020, section 3) where the data is of a shifted domain. ``inf`` leaves the
            statistics as they are.
        pooled: True, the mean and the *unbiased* variance of all the data together, each value counted once. False,
            Ioffe & Szegedy's estimator: the average of the batch means and of the *unbiased within-batch* variances,
            each batch counted once.
        exact: False, each layer normalises with the batch, as in training: deeper layers' statistics are biased where
            batches are small. True, the batches go through the network together and each layer normalises all of them
            with its new statistics: those of the network as it runs at inference, for batches of any size and order.
            It takes about as long, and holds the activations of all batches at one layer. It can't stop early, so it
            takes no `tolerance`.
        memory_budget: bytes of activations that ``exact=True`` may hold in memory. Beyond them those of waiting batches
            are in a temporary file (on an accelerator: in pinned memory of the host), to the same bits. None: half of
            what is free on the device when it begins; ``float("inf")``: no file.
        layers: None, those that track statistics and are not frozen: frozen is a layer of whose parameters (of one
            without any: of whose module) none has ``requires_grad=True``, and, in a model in training mode, one in eval
            mode. ``"all"``: the frozen too. Or a predicate ``(name, module) -> bool``.
        device: where the batches are moved. None: where the model's first parameter is.
        spread: True, the layers also keep how much one image's channel moments differ from another's, for `drift` and
            `watch_drift`; it is saved with the model. The batches are read once more, with the new statistics, so
            `batches` is a loader or a list, of data like those that will come: a network treats images that it was
            trained on differently. Up to 2,000 images, taken at random, are in memory: 8 bytes a channel and image.
            With ``prior=float("inf")`` the statistics stay, and only the spread is measured.
        dry_run: report what would change, and change nothing.
        progress: show a progress bar.
        process_group: the ranks that recalibrate the model together, None for all. Of ranks that see the same data, as
            under tensor parallelism, one each belongs into it.

    Returns:
        A `RecalibrationReport`: prints as a table, has ``as_dict()``, and ``rollback()`` restores the old statistics
        bit for bit.

    Raises:
        TypeError: an argument or a batch of the wrong kind.
        ValueError: an argument out of range; no layer to recalibrate; no batches; batches in which no layer ran or
            nothing was finite.

    A layer that is called several times is merged over its calls; one that was not called keeps its statistics and is
    named in the report, and so does one all of whose data is not finite. What is not finite is left out, batch by
    batch. Of padded input the valid positions count, where the forward passes this package's layers a mask.

    Of a model with `StatisticsSets` the set in place is recalibrated, from the forwards that use it.

    An averaging's own history (a window's batches) stays as it is: the new statistics are in force until the next
    training batch. Then a `Window` or a pooled `Cumulative` goes back to its batches, and an `Exponential` blends the
    batch into the new statistics.

    In a process group every rank calls it, with its own batches, of which some may have none; their data is merged, and
    all ranks end with bit-identical statistics. What fails on one rank is raised on all.

    What the forward writes elsewhere is restored too: parameters, gradients, buffers, and what the model's attributes
    hold at any depth, but for iterators, attributes in slots and objects of classes written in C. For this the forward
    works on lazy copies of the model's tensors, on their own device: what nobody writes takes no memory. Tensors in
    shared memory or over an array of numpy's are copied. An array that was taken from a tensor before, is held outside
    of the model and is written by the forward is not seen.

    Example:
        >>> import torch
        >>> from lightning_bn import recalibrate
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> report = recalibrate(model, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])], progress=False)
        >>> model[0].running_mean, model[0].running_var
        (tensor([3.]), tensor([7.]))
        >>> report.rollback()
        >>> model[0].running_mean, model[0].running_var
        (tensor([0.]), tensor([1.]))

    Reference: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3, for what stale statistics cost and for
        both estimators.
    """
    options = _Options(num_batches, tolerance, prior, exact, memory_budget, spread, dry_run, progress)
    core = unwrapped(model)
    ranks = Ranks(process_group, task=_CALL, afterwards="The statistics of all ranks are as before.")
    with ranks.told():
        options.check(batches)
        chosen = choose(core, layers)
        check_not_distributed(chosen, _CALL)
        if process_group is None:
            check_each_sees_its_own(core, _CALL)
        sharded = is_sharded(core)
        if exact and sharded:
            raise ValueError(
                "recalibrate(exact=True): the model's parameters are spread over the ranks (fully_shard, FSDP, tensor "
                "parallelism or DeepSpeed) and are gathered for one forward at a time, while exact has all batches in "
                "their forwards at once. Leave out exact=True, and take larger batches."
            )
        if spread:
            check_whole(core)
        run = runner(core, forward, device)
    ranks.agree(_common(core, chosen, options, pooled=pooled, sharded=sharded))
    report, changes = _estimated(
        core,
        chosen,
        ranks,
        batches,
        run,
        options,
        Estimator(chosen, ranks, pooled=pooled, prior=prior),
        sharded=sharded,
    )
    report = replace(report, not_supported=not_supported(core, layers))
    commit(changes)
    if lost := unsaved_by_adapter(core, [layer.name for layer in chosen]):
        names = [name.rpartition("base_model.model.")[2] for name in lost]
        warnings.warn(
            f"recalibrate: {', '.join(names[:3])}{', ...' * (len(names) > 3)} belong to the base model of a peft "
            "adapter, and save_pretrained does not write their statistics; a state_dict does. To have them in the "
            f"adapter's file, make it with LoraConfig(..., modules_to_save={names}).",
            stacklevel=2,
        )
    if not spread:
        return report
    try:
        return with_spread(
            report,
            model,
            batches,
            forward=forward,
            num_batches=num_batches,
            device=device,
            process_group=process_group,
        )
    except BaseException:
        report.rollback()
        raise


@contextmanager
def recalibrated(model: nn.Module, batches: Iterable[Any], **options: Any) -> Iterator[RecalibrationReport]:
    """Recalibrate `model` inside the block, and restore the old statistics bit for bit afterwards, also on an
    exception.

    For evaluation on another domain than that of training.

    Args:
        model: see `recalibrate`.
        batches: of the domain on which the block runs the model; no labels are needed.
        **options: as of `recalibrate`.

    Example:
        >>> import torch
        >>> from lightning_bn import recalibrated
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1)).eval()
        >>> foggy = torch.tensor([[101.0], [103.0]])
        >>> with recalibrated(model, [foggy], progress=False):
        ...     print(model(foggy).detach().flatten())
        tensor([-0.7071,  0.7071])
        >>> model[0].running_mean
        tensor([0.])

    It fails on streams that show one class at a time: see "Where adaptation fails" in the documentation's page on
    recalibration.
    """
    report = recalibrate(model, batches, **options)
    try:
        yield report
    finally:
        report.rollback()


def _estimated(
    model: nn.Module,
    chosen: list[BatchNormLayer],
    ranks: Ranks,
    batches: Iterable[Any],
    run: Callable[[Any], object],
    options: _Options,
    estimator: Estimator,
    *,
    sharded: bool,
) -> tuple[RecalibrationReport, list[StatisticsChange]]:
    """Let the data through the model, and return the report, and the changes to make; nothing is changed yet."""
    collection = _pass(model, chosen, ranks, estimator, options, sharded=sharded)
    with (
        no_garbage_collected() as collects,
        all_else_kept(model, batches) as tensors,
        measured([layer.module for layer in chosen], collection.on_input, one_by_one=not options.exact),
    ):
        try:
            once = run if options.exact else with_the_weights_as_they_are(run, tensors)
            with _old_objects_kept(collects):  # a forward may leave garbage
                seen = collection.collect(second_loader(batches), once)
        except BaseException as error:
            # Other ranks of a sharded model wait in a forward, for parameters, and would take a word for these.
            if not sharded:
                ranks.fail(error)
            raise
        if ranks.are_several:
            seen = merged(seen, ranks)
        changes = agreed_changes(chosen, ranks, estimator, seen)
        reports = layer_reports(chosen, estimator.old, changes, seen.summary)
    made = [] if options.dry_run else [change for change in changes if change is not None]
    report = RecalibrationReport(
        batches=seen.batches,
        samples=seen.samples,
        skipped=seen.skipped,
        layers=reports,
        not_run=tuple(layer.name for layer, change in zip(chosen, changes, strict=True) if change is None),
        stopped_by=seen.stopped_by,
        num_batches=options.num_batches,
        tolerance=options.tolerance,
        dry_run=options.dry_run,
        spilled=seen.spilled,
        _changes=tuple(made),
    )
    return report, made


@contextmanager
def _old_objects_kept(collects: bool) -> Iterator[None]:
    """Inside of `no_garbage_collected`, let Python look for garbage again if `collects`, but only among what is made
    inside; among all, if somebody has frozen objects already, which can't be told from others."""
    if not collects:  # nor is it disabled here at the end: another thread may have enabled it for itself
        yield
        return
    freezes = not gc.get_freeze_count()
    try:
        if freezes:
            gc.freeze()
        gc.enable()
        yield
    finally:
        gc.disable()
        if freezes:
            gc.unfreeze()


@dataclass(frozen=True)
class _Options:
    num_batches: int | None
    tolerance: float | None
    prior: float
    exact: bool
    memory_budget: float | None
    spread: bool
    dry_run: bool
    progress: bool

    def check(self, batches: object) -> None:
        if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
            raise TypeError(
                "recalibrate(model, batches): batches is an iterable of batches, such as a DataLoader; this is a "
                f"{type(batches).__name__}. If it is one batch, pass [batch]."
            )
        if self.num_batches is not None and (
            isinstance(self.num_batches, bool) or not isinstance(self.num_batches, int) or self.num_batches < 1
        ):
            raise ValueError(
                f"recalibrate(num_batches={self.num_batches!r}): a number of batches, at least 1; leave it out to read "
                f"all."
            )
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(
                f"recalibrate(tolerance={self.tolerance!r}): a standard error in standard deviations, above 0, as in "
                f"0.05."
            )
        if not self.prior >= 0:
            raise ValueError(f"recalibrate(prior={self.prior!r}): a number of samples, 0 or more, or float('inf').")
        if self.memory_budget is not None and not (self.exact and self.memory_budget >= 0):
            raise ValueError(
                f"recalibrate(exact={self.exact}, memory_budget={self.memory_budget!r}): bytes that the activations of "
                "all batches may take in memory, 0 or more, with exact=True; without it no batch waits for another."
            )
        if self.spread and self.dry_run:
            raise ValueError(
                "recalibrate(spread=True, dry_run=True): the spread is measured with the new statistics, which a dry "
                "run does not write. Leave out one of the two."
            )
        if self.spread and isinstance(batches, Iterator):
            raise ValueError(
                f"recalibrate(model, batches, spread=True) reads the batches twice, and this {type(batches).__name__} "
                "is used up when it is read once. Pass a loader or a list."
            )
        if self.exact and self.tolerance is not None:
            raise ValueError(
                f"recalibrate(exact=True, tolerance={self.tolerance!r}): exact needs all batches at once and can't "
                "stop in between. Pass num_batches=... with exact=True, or tolerance alone."
            )


def _common(
    model: nn.Module, chosen: list[BatchNormLayer], options: _Options, *, pooled: bool, sharded: bool
) -> dict[str, object]:
    """What must be the same on all ranks, by the name that an error gives it."""
    return {
        "the model": type(model).__name__,
        "the number of layers": len(chosen),
        "the layers": [(layer.name, layer.module.num_features) for layer in chosen],
        "whether the model is sharded": sharded,
        "pooled": pooled,
        **{name: value for name, value in vars(options).items() if name not in ("progress", "memory_budget")},
    }


def _pass(
    model: nn.Module,
    chosen: list[BatchNormLayer],
    ranks: Ranks,
    estimator: Estimator,
    options: _Options,
    *,
    sharded: bool,
) -> OnePass | ExactPass:
    modules = [layer.module for layer in chosen]
    if not options.exact:
        return OnePass(
            modules,
            ranks,
            in_step=sharded and ranks.are_several,
            num_batches=options.num_batches,
            tolerance=options.tolerance,
            progress=options.progress,
        )
    from lightning_bn.recalibration.exact import ExactPass  # it alone needs greenlet

    return ExactPass(
        modules,
        ranks,
        estimator.of_layer,
        num_batches=options.num_batches,
        progress=options.progress,
        budget=options.memory_budget,
        model=model,
    )
