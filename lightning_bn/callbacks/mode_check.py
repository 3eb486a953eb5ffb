"""Train/eval mode mistakes, caught when they happen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_bn.callbacks.both_lightnings import (
    BaseFinetuning,
    Callback,
    Checkpoint,
    LightningModule,
    Trainer,
    callbacks_of,
    evaluated_batches,
    evaluation_stage,
    is_overridden,
    logging_interval,
    set_callbacks,
)
from lightning_bn.callbacks.lightning_internals import logging_step
from lightning_bn.callbacks.loggers import log_markdown
from lightning_bn.callbacks.observing import boundary_of, meeting, observing
from lightning_bn.callbacks.run_journal import journal_of
from lightning_bn.callbacks.synchronisation import check_plugin_is_applied
from lightning_bn.callbacks.terminal import LastWords
from lightning_bn.callbacks.training_pass import on_training_device
from lightning_bn.choices import Choices, as_list, as_patterns, check_choices
from lightning_bn.discovery import Modes, find_batch_norms, parts_called_by
from lightning_bn.layers.deferred import settle_together
from lightning_bn.modes import is_held_in_eval
from lightning_bn.ranks.collective import Ranks
from lightning_bn.rules import RULES, Finding, ModeCheckError
from lightning_bn.rules.arguments import Setting, check_action, check_codes
from lightning_bn.rules.finding import Action, findings_markdown, open_mistakes, what_is_open
from lightning_bn.rules.inspection import Inspection

_TAG = "batch_norm/mode_check"


@observing
class ModeCheck(Callback):
    """Watch the modes of all modules and the updates of the batch-norm statistics, and name every mistake with its fix.

    ``lightning-bn rules`` lists every rule, ``lightning-bn rules BN101`` explains one. What happens in a forward is
    seen by hooks on the batch-norm layers and by the version of ``num_batches_tracked``, which the host keeps; only
    once every `every_n_steps`, and at the end of epochs and evaluations, is a value read from the device. Inside
    code compiled by ``torch.compile`` no hook fires: those layers are judged by how often their statistics moved,
    and BN100 names them, with all norms that this package does not serve.

    Args:
        action: "warn": a warning for each finding above information, once per rule and layer; layers with one cause
            share one. "raise": a `ModeCheckError` at the first of them. "log": neither. All findings are in `findings`
            and go to the loggers in any case.
        ignore: codes of rules to leave out.
        allow_eval: modules kept in eval mode on purpose, with all below them: a name, a pattern of names
            (``backbone.*``), a class, a function of name and module, or several of these.
        fix: codes of rules whose findings are fixed at once, by putting modules into the mode they should be in: BN101,
            BN102, BN103, BN105, BN201. This changes what training computes; a finding that was fixed does not raise.
        every_n_steps: training batches between two reads of the statistics' values; None: the Trainer's
            ``log_every_n_steps``.

    Attributes:
        findings: the list of `Finding`, of all runs of this callback.

    Raises:
        ValueError: an unknown action or code, a rule in `fix` that can't be mended; when a run starts, a pattern that
            no module matches.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import ModeCheck
        >>> trainer = Trainer(callbacks=[ModeCheck(allow_eval=["backbone"])], logger=False, enable_checkpointing=False)
    """

    __module__ = "lightning_bn"

    def __init__(
        self,
        *,
        action: Action = "warn",
        ignore: Sequence[str] = (),
        allow_eval: Choices = (),
        fix: Sequence[str] = (),
        every_n_steps: int | None = None,
    ) -> None:
        check_action("ModeCheck", action)
        check_codes(f"ModeCheck(ignore={ignore!r})", ignore, RULES)
        check_codes(f"ModeCheck(fix={fix!r})", fix, [code for code, rule in RULES.items() if rule.mendable])
        if every_n_steps is not None and (not isinstance(every_n_steps, int) or every_n_steps < 1):
            raise ValueError(
                f"ModeCheck(every_n_steps={every_n_steps!r}): a number of training batches, at least 1, or None."
            )
        check_choices(f"ModeCheck(allow_eval={allow_eval!r})", allow_eval)
        self.action = action
        self.ignore = tuple(ignore)
        self.allow_eval = tuple(as_list(allow_eval))
        self.fix = tuple(fix)
        self.every_n_steps = every_n_steps
        self.findings: list[Finding] = []
        self._boundary = boundary_of("ModeCheck", self._close, intended=(ModeCheckError,))
        self._inspection: Inspection | None = None
        self._batches = 0
        self._modes: Modes | None = None
        self._met = self._ended = False
        self._classes: dict[str, type[nn.Module]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Before the strategy replaces any.
        self._classes = {layer.name: type(layer.module) for layer in find_batch_norms(pl_module)}
        # Behind all others but those that save: what they do to modes before a batch is not the training step's doing.
        callbacks = callbacks_of(trainer)
        savers = [each for each in callbacks if isinstance(each, Checkpoint)]
        others = [each for each in callbacks if each is not self and each not in savers]
        set_callbacks(trainer, [*others, self, *savers])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_plugin_is_applied(trainer, pl_module)
        settle_together(pl_module)
        self._start(trainer, pl_module)
        # The module's own hook comes after all callbacks'.
        self._look().modes_from = "forward" if is_overridden("on_train_batch_start", pl_module) else "start"

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._modes = self._look().observer.snapshot()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look().returned()
        self._report(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        journal_of(trainer).begin(trainer, pl_module)
        inspection = self._look()
        inspection.returned()
        inspection.tell("configuration")
        inspection.tell("end_batch")
        self._report(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look().begin_epoch()
        journal_of(trainer).epoch(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        inspection = self._look()
        inspection.returned()
        if batch_idx == 0:
            # Not when the epoch starts: the module's own hooks, which may exchange layers, come after this one's.
            inspection.renew(lambda: parts_called_by(pl_module))
        inspection.begin_batch("train", trainer.global_step, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._look().trace(loss, loss=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        inspection = self._look()
        inspection.end_batch()
        # Lightning puts a module in eval mode before any hook of a validation.
        self._modes = inspection.modes
        if is_overridden("on_validation_model_eval", pl_module):
            inspection.fit_test.anchor()  # the hook comes before any of a callback's
        self._batches += 1
        if self._batches % (self.every_n_steps or logging_interval(trainer) or 50) == 0:
            inspection.examine()
        self._report(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        inspection = self._look()
        inspection.returned()
        inspection.examine()
        inspection.end_epoch()
        inspection.fit_test.anchor()
        self._report(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look().tell("end_training")
        self._report(trainer)

    @meeting
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = True

    @meeting
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_evaluation(trainer, pl_module)
        if not is_overridden("on_validation_model_eval", pl_module):
            self._boundary.attempt("", lambda: self._look().fit_test.anchor())

    @meeting
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_evaluation(trainer, pl_module)

    on_predict_start = on_test_start

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # Measured are those of the first loader.
        batches = next(iter(evaluated_batches(trainer)), None)
        self._look().begin_batch(evaluation_stage(trainer), trainer.global_step, batch_idx, batches)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._look().end_batch()
        self._report(trainer)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    @meeting
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._meet(trainer, lambda: self._look().end_evaluation())
        self._boundary.attempt("", lambda: journal_of(trainer).validation(trainer))

    @meeting
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._meet(trainer, lambda: self._look().end_evaluation())

    on_predict_end = on_test_end

    @meeting
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Averaged weights may be put in, and recalibrated, in on_train_end and on_fit_end of callbacks, and then of the
        # module.
        ended, self._ended = self._ended, False
        try:
            if ended:
                with on_training_device(trainer, pl_module):
                    self._meet(trainer, lambda: self._look().left())
        finally:
            self._boundary.attempt("", self._close)
            self._boundary.attempt("", lambda: journal_of(trainer).end(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, ModeCheckError):
            self._close()
        elif self._inspection is not None:
            self._inspection.interrupt()
            self._report(trainer, may_raise=False)
        journal_of(trainer).end(trainer, type(exception).__name__)

    def _last_words(self, trainer: Trainer) -> LastWords:
        """The mistakes that nothing has mended, and how many notes there are that were not printed."""
        is_mistake = len(open_mistakes(self.findings)) > 0
        return LastWords(1, what_is_open(self.findings), is_mistake=is_mistake, is_aside=self.action == "log")

    def _close(self) -> None:
        if self._inspection is not None:
            self._inspection.close()

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        """Set the hooks; the findings of earlier runs of the same module are not told again."""
        held = [layer.name for layer in find_batch_norms(module) if is_held_in_eval(layer.module)]
        setting = Setting(
            root="self",
            caller="ModeCheck",
            allow_eval=(*as_patterns(module, self.allow_eval), *held),
            ranks=trainer.world_size,
            accumulated=trainer.accumulate_grad_batches,
            manual=not module.automatic_optimization,
            scheduled=any(isinstance(each, BaseFinetuning) for each in callbacks_of(trainer)),
            own_statistics=_has_statistics_of_each_rank(trainer),
            classes=self._classes,
            share=self._share if Ranks(task="ModeCheck").are_several else None,
            optimizers=(lambda: trainer.optimizers) if trainer.state.fn == TrainerFn.FITTING else None,
        )
        known = self._inspection
        if known is None or known.model is not module or known.observer.modules != list(module.modules()):
            self._inspection = Inspection(module, setting, ignore=self.ignore, fix=self.fix, boundary=self._boundary)
        else:
            known.setting = setting
        self._look().attach(parts_called_by(module))
        self._look().returned()
        self._report(trainer)

    def _look(self) -> Inspection:
        if self._inspection is None:
            raise RuntimeError(
                "ModeCheck: a hook came before on_fit_start; was the callback added while the Trainer was running?"
            )
        return self._inspection

    def _begin_evaluation(self, trainer: Trainer, module: LightningModule) -> None:
        begin = partial(self._begin_evaluation_here, trainer, module)
        if _has_statistics_of_each_rank(trainer):
            self._meet(trainer, begin)  # for BN306
        else:
            self._boundary.attempt("", begin)

    def _begin_evaluation_here(self, trainer: Trainer, module: LightningModule) -> None:
        before, self._modes = self._modes, None
        if trainer.state.fn != TrainerFn.FITTING:
            before = None
            self._start(trainer, module)
        elif self._look().renew(lambda: parts_called_by(module)):
            before = None
        self._look().begin_evaluation(evaluation_stage(trainer), trainer.global_step, before)

    def _meet(self, trainer: Trainer, end: Callable[[], object]) -> None:
        """Call `end`, in which ranks may `_share`, and report. Every rank shares at least once, whatever fails here."""
        self._met = False
        try:
            self._boundary.attempt("", end)
        finally:
            if not self._met:
                self._share([])
        self._boundary.attempt("", self._report, trainer)

    def _share(self, value: Any) -> list[Any]:
        self._met = True
        return Ranks(task="ModeCheck").share(value)

    def _report(self, trainer: Trainer, *, may_raise: bool = True) -> None:
        new = self._look().new()
        if not new:
            return
        self.findings += new
        self._boundary.attempt("its entries in the loggers", self._log, trainer)
        for finding in new:
            journal_of(trainer).write(trainer, "finding", **asdict(finding))
            journal_of(trainer).rule(trainer, finding.code)
            if self.action == "warn" and finding.level != "info":
                rank_zero_warn(str(finding), stacklevel=6)
        unmended = [finding for finding in new if finding.level != "info" and not finding.mended]
        journal_of(trainer).has_mistake |= bool(unmended)
        if self.action == "raise" and unmended and may_raise:
            raise ModeCheckError(unmended)

    def _log(self, trainer: Trainer) -> None:
        step = logging_step(trainer)
        counts = {
            level: sum(finding.level == level for finding in self.findings) for level in ("error", "warning", "info")
        }
        for logger in trainer.loggers:
            logger.log_metrics({f"{_TAG}/{level}s": float(count) for level, count in counts.items()}, step=step)
        log_markdown(trainer.loggers, f"{_TAG}/findings", findings_markdown(self.findings), step)


def _has_statistics_of_each_rank(trainer: Trainer) -> bool:
    """Tell whether DDP leaves each of several ranks its own running statistics."""
    return trainer.world_size > 1 and getattr(trainer.model, "broadcast_buffers", True) is False
