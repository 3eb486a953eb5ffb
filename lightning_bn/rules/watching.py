"""The rules without a Trainer: at a model at rest, or around a loop of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_bn.choices import Choices, as_patterns
from lightning_bn.discovery import NamedModules
from lightning_bn.rules import RULES, Finding, ModeCheckError
from lightning_bn.rules.arguments import Setting, check_action, check_codes, check_patterns
from lightning_bn.rules.finding import Action
from lightning_bn.rules.inspection import Inspection
from lightning_bn.rules.observer import nested_tensors
from lightning_bn.rules.register import Register
from lightning_bn.rules.rule import Occasion


def check(model: nn.Module, *, ignore: Sequence[str] = (), allow_eval: Choices = ()) -> list[Finding]:
    """Return what can be seen in `model` without running it; nothing in it is changed.

    Args:
        model: any module, for instance one that a checkpoint was loaded into. Rules about training look at the parts in
            train mode.
        ignore: codes of rules to leave out.
        allow_eval: modules that are in eval mode on purpose: a name, a pattern of names (``backbone.*``), a class, a
            function of name and module, or several of these.

    Raises:
        ValueError: an unknown code, or a pattern that no module matches.

    Example:
        >>> from torch import nn
        >>> from lightning_bn import check
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.0))
        >>> [(finding.code, finding.layers) for finding in check(model)]
        [('BN301', ('1',))]
    """
    setting = Setting(caller="check", allow_eval=as_patterns(model, allow_eval))
    check_codes(f"check(ignore={list(ignore)})", ignore, RULES)
    at, register = Occasion(NamedModules(model), setting), Register(ignore)
    check_patterns(setting, at.observer.names)
    register.ask("configuration", at)
    register.ask("at_rest", at)
    register.ask_of_values(at, "nothing was known of them before")
    return register.findings


@contextmanager
def watch(
    model: nn.Module, *, action: Action = "warn", ignore: Sequence[str] = (), allow_eval: Choices = ()
) -> Iterator[list[Finding]]:
    """Observe the forwards of `model` in your own training loop, and report at exit.

    A step of any optimizer of torch's that holds one of the model's parameters ends a training batch, and so does a
    backward that another input follows, or, as long as no such step was seen, any input. A call of the model in eval
    mode without grad, behind training batches, begins an evaluation, by the first batch of which the running statistics
    are judged (BN208). What only a Trainer knows (stages, batches, who changed a mode or exchanged weights) is not
    checked. No hook is left, also after an exception.

    Args:
        model: the module that the loop calls; for Fabric, the one that ``fabric.setup`` returned.
        action: at exit, "warn": one warning for each finding that is more than information. "raise": a `ModeCheckError`
            for them all. "log": nothing; look at the list.
        ignore: codes of rules to leave out.
        allow_eval: modules that are in eval mode on purpose, as for `check`.

    Yields:
        The list of findings, which grows as the loop runs and is complete at exit.

    Example:
        >>> import torch
        >>> from lightning_bn import watch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        >>> with watch(model, action="log") as findings, torch.no_grad():
        ...     _ = model(torch.randn(8, 2))  # model.eval() was forgotten
        >>> [finding.code for finding in findings if finding.level != "info"]
        ['BN106']
    """
    check_action("watch", action)
    inspection = Inspection(model, Setting(caller="watch", allow_eval=as_patterns(model, allow_eval)), ignore=ignore)
    inspection.modes_from = "end"
    inspection.attach([model])
    own = {id(parameter) for parameter in model.parameters()}
    batches = _Batches(inspection)

    def is_seen(module: nn.Module) -> bool:
        # A copy of the model has these hooks too; nothing is recorded while a training batch is run again.
        return not torch.compiler.is_compiling() and module is model and inspection.observer.recording

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if is_seen(module):
            batches.begin_call(module, args, kwargs)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if is_seen(module):
            batches.end_call(output)

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            batches.step(optimizer)

    handles = [
        # Before the hook by which the observer takes the call for one of the last batch.
        model.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        model.register_forward_hook(after),
        register_optimizer_step_post_hook(after_step),
    ]
    try:
        inspection.tell("configuration")
        inspection.begin_batch("train", 0, 0)
        yield inspection.findings
    finally:
        for handle in handles:
            handle.remove()
        inspection.finish()
    _report(inspection.findings, action)


class _Batches:
    """Tells where the batches of a loop end that nobody announces.

    A second forward of the same input after a backward is a second pass of one step, as in sharpness-aware minimisation
    and LBFGS, where an optimizer of torch's takes the steps; an optimizer that is none of torch's is not seen.
    """

    def __init__(self, inspection: Inspection) -> None:
        self._inspection = inspection
        self._batches = self._steps = 0
        self._backward = False
        self._evaluated_at = -2  # a model that is evaluated before it is trained is judged too
        self._evaluates = False

    def begin_call(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """The model is called; the statistics are judged by the first call of an evaluation."""
        known = self._steps > 0 and self._inspection.observer.knows_input(args, kwargs)
        if self._backward and not known:
            self._next()
        self._backward = self._evaluates = False  # a call that raised has no end
        if not model.training and not torch.is_grad_enabled():
            since, self._evaluated_at = self._batches - self._evaluated_at, self._batches
            # In each step there may be a call of a teacher, or for pseudo-labels.
            if since > 1:
                self._evaluates = True
                self._inspection.begin_evaluating_call()

    def end_call(self, output: Any) -> None:
        """The call has ended."""
        self._inspection.trace(output)
        first = next((each for each in nested_tensors(output) if each.requires_grad), None)
        if first is not None:
            first.register_hook(self._passed)
        if self._evaluates:
            self._evaluates = False
            self._inspection.end_evaluating_call()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer of torch's has stepped."""
        if isinstance(optimizer, LBFGS):
            self._inspection.setting = replace(self._inspection.setting, repeats=True)
        self._steps, self._backward = self._steps + 1, False
        self._next()

    def _passed(self, gradient: Any) -> None:
        self._backward = True

    def _next(self) -> None:
        self._batches += 1
        self._inspection.end_batch()
        self._inspection.begin_batch("train", self._steps, self._batches)


def _report(findings: Sequence[Finding], action: str) -> None:
    """Warn of the findings above information, or raise for those that were not mended."""
    serious = [finding for finding in findings if finding.level != "info"]
    if action == "warn":
        for finding in serious:
            warnings.warn(str(finding), stacklevel=4)
    unmended = [finding for finding in serious if not finding.mended]
    if action == "raise" and unmended:
        raise ModeCheckError(unmended)
