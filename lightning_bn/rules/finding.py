"""What a rule found: fields first, and the message or the table made of them when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_bn.tables import html_table, markdown_table

Level = Literal["error", "warning", "info"]

Action = Literal["warn", "raise", "log"]
"""What to do with a finding above information."""

_LISTED = 4  # mistakes at the end of a run

Place = Literal[
    "before fit",
    "at the end of the training step",
    "before the evaluation",
    "at the start of the evaluation step",
    "around that forward",
    "around the export",
    "after the teacher's weights are averaged",
    "instead of the override of on_validation_model_train",
    "in the Trainer",
    "in the training DataLoader",
    "where the model is built",
    "after training",
    "in the schedule's call of freeze",
    "advice",
]
"""Where the code of a fix goes. "advice": it is words, not code."""


@dataclass(frozen=True)
class Fix:
    """A change that mends a finding: code that runs as printed, where it goes, and what else to know.

    In the code, ``self`` (or ``model``, see `Finding`) is the module that was watched, and names of this package,
    ``torch`` and ``nn`` are imported. A ``with`` line goes around what is to be mended; an argument (``name=value``)
    goes into the call that `place` names.
    """

    __module__ = "lightning_bn"

    code: str
    place: Place = "before fit"
    note: str = ""

    def __str__(self) -> str:
        remark = "; ".join(part for part in (self.place if self.place != "advice" else "", self.note) if part)
        return f"{self.code}  # {remark}" if remark else self.code


@dataclass(frozen=True)
class Finding:
    """A mistake that was seen.

    ``str(finding)`` is its message, of six lines: what happened, where and when; why it matters; the fix; how to
    silence it.
    """

    __module__ = "lightning_bn"

    code: str
    level: Level
    """error: certain and harmful. warning: observed, and possibly intentional. info: harmless, or only probable."""
    title: str
    layers: tuple[str, ...]
    """Names of all layers or modules it is about."""
    where: str
    """The same in words: the topmost modules that hold them, the first few of many."""
    stage: str
    """train, sanity_check, validate, test, predict; "check" where nothing ran."""
    step: int
    """Optimizer steps taken by then."""
    seen: str
    """The event that was observed."""
    why: str
    """Why it matters."""
    fix: Fix
    """The fix."""
    link: str
    """Where to read on."""
    quiet: str
    """The argument that silences the rule."""
    mended: bool = False
    """Whether it was fixed at once, as `fix` asked."""
    follows: str | None = None
    """The code of the finding that this one is a consequence of; it is then information."""

    @property
    def message(self) -> str:
        """The finding in six lines."""
        when = "" if self.stage == "check" else f"; {self.stage}, step {self.step}"
        return "\n".join(
            (
                f"{self.code} {self.level}: {self.title}{' (fixed at once)' if self.mended else ''}",
                f"  where: {self.where}{when}",
                f"  seen:  {f'follows from {self.follows}: ' if self.follows else ''}{self.seen}",
                f"  why:   {self.why}",
                f"  fix:   {self.fix}",
                f"  quiet: {self.quiet}; more: {self.link}",
            )
        )

    def __str__(self) -> str:
        return self.message

    def _repr_html_(self) -> str:
        head, *lines = self.message.splitlines()
        rows = [[name, text.strip()] for name, _, text in (line.strip().partition(":") for line in lines)]
        return html_table(head, ["", ""], rows)


class ModeCheckError(RuntimeError):
    """Raised in place of a warning; `findings` are those that raised it."""

    __module__ = "lightning_bn"

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = list(findings)
        super().__init__("\n".join(str(finding) for finding in findings))


def open_mistakes(findings: Iterable[Finding]) -> list[Finding]:
    """Return the errors and then the warnings that nothing has mended."""
    found = [each for each in findings if each.level != "info" and not each.mended]
    return sorted(found, key=lambda each: each.level)


def what_is_open(findings: Sequence[Finding]) -> list[str]:
    """Return lines for the end of a run: the mistakes that are still there, and where the notes are."""
    mistakes = open_mistakes(findings)
    lines = [f"Open {each.level}: {each.code} {each.title}: {each.where}." for each in mistakes[:_LISTED]]
    if len(mistakes) > _LISTED:
        lines.append(f"And {len(mistakes) - _LISTED} more.")
    if mistakes:
        lines.append(f"  To do: see the warnings above, or lightning-bn rules {mistakes[0].code}.")
    notes = [each.code for each in findings if each.level == "info"]
    if notes:
        lines.append(
            f"{len(notes)} note{'s' * (len(notes) > 1)} of ModeCheck ({', '.join(dict.fromkeys(notes))}), likely or "
            "harmless: the page and ModeCheck.findings have them."
        )
    return lines


def findings_markdown(findings: Iterable[Finding]) -> str:
    """Return the findings as a Markdown table, the worst first."""
    rows = []
    for finding in sorted(findings, key=lambda finding: ("error", "warning", "info").index(finding.level)):
        what = (
            finding.title,
            f"seen: {finding.seen}",
            f"why: {finding.why}",
            f"fix: `{finding.fix}`",
            f"more: {finding.link}",
        )
        when = f"{finding.stage}, step {finding.step}"
        rows.append((finding.level, finding.code, finding.where, when, "<br>".join(what)))
    return "\n".join(markdown_table(("level", "rule", "where", "when", "what"), rows, left=5))
