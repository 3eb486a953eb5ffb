"""What the rules found: each finding once, and as information where it follows from another."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from lightning_bn.discovery import BatchNormLayer, ancestors, listing
from lightning_bn.error_boundary import UNBOUNDED, ErrorBoundary
from lightning_bn.rules import RULES, Finding, Level, Rule
from lightning_bn.rules.fixes import modules_of
from lightning_bn.rules.rule import OCCASIONS, Occasion, Seen
from lightning_bn.rules.snapshots import StatisticsSnapshot, waiting_sets

LINK = "lightning-bn rules {code}"
"""Where a message sends its reader: the page of the rule, printed by the command that is installed with the package."""

_LEVELS = ("info", "warning", "error")

# What follows from a finding about the same layers is information. A rule that is ignored explains nothing.
_CAUSES = {
    "BN201": ("BN103", "BN105"),
    "BN204": ("BN101", "BN102", "BN103", "BN105", "BN301"),
    "BN207": ("BN209",),
    "BN208": ("BN104", "BN106", "BN107", "BN201", "BN202", "BN207", "BN209", "BN301", "BN307"),
    "BN209": ("BN101", "BN204", "BN207"),
    "BN210": ("BN203", "BN204", "BN207", "BN208"),
}


class Register:
    """Asks the rules, and keeps what they answer.

    Args:
        ignore: codes of rules that are not asked.
        fix: codes of rules whose findings are fixed at once.
        boundary: of the observer; a rule that fails is asked no more.
    """

    def __init__(self, ignore: Collection[str], fix: Collection[str] = (), boundary: ErrorBoundary = UNBOUNDED) -> None:
        self._boundary = boundary
        self.findings: list[Finding] = []
        rules = [type(rule)() for code, rule in RULES.items() if code not in ignore]
        self._asked = {occasion: [rule for rule in rules if hasattr(rule, occasion)] for occasion in OCCASIONS}
        self._fix = set(fix)
        self.mends = bool(fix)
        """Whether anything is fixed at once."""
        self._severity: dict[str, dict[str, int]] = {code: {} for code in RULES}  # by rule and layer

    def reported(self, code: str) -> Collection[str]:
        """Return the layers or modules that a rule has spoken of, and that stay as they are."""
        return () if code in self._fix else self._severity[code].keys()

    def ask(self, occasion: str, at: Occasion, *evidence: object) -> bool:
        """Ask the rules that have something to say on one of the `OCCASIONS`; returns whether anything was mended."""
        asked = self._asked[occasion]
        answers = [self._boundary.attempt(f"rule {r.code}", self._ask, r, occasion, at, evidence) for r in asked]
        return any(answers)

    def ask_of_values(self, at: Occasion, last: str) -> bool:
        """Ask about the values of all sets of running statistics, as `Rule.values`; waits for the device."""
        mended = False
        sets: list[tuple[str | None, Sequence[BatchNormLayer]]] = [(None, at.layers), *waiting_sets(at.layers).items()]
        for in_set, layers in sets:
            reading = StatisticsSnapshot(layers)
            if not reading.sound():
                mended |= self.ask("values", at, reading.values(), last, in_set)
        return mended

    def _ask(self, rule: Rule, occasion: str, at: Occasion, evidence: Sequence[object]) -> bool:
        mended = [self._take(rule, seen, at) for seen in getattr(rule, occasion)(at, *evidence) or ()]
        return any(mended)

    def _take(self, rule: Rule, seen: Seen, at: Occasion) -> bool:
        mended = rule.code in self._fix and seen.mend is not None
        if mended and seen.mend is not None:
            seen.mend()
        cause = self._cause(rule, seen)
        level: Level = "info" if cause is not None else seen.level or rule.level
        known, severity = self._severity[rule.code], _LEVELS.index(level)
        new = [name for name in seen.layers if known.get(name, -1) < severity]
        if new:
            known.update(dict.fromkeys(new, severity))
            self.findings.append(_finding(rule, replace(seen, layers=new, level=level), at, mended, cause))
        return mended

    def _cause(self, rule: Rule, seen: Seen) -> str | None:
        """Return the rule that has spoken, above information, of all these layers, where this follows from it."""
        for code in _CAUSES.get(rule.code, ()):
            told = {name for name, severity in self._severity[code].items() if severity > 0}
            if told and all(told.intersection((name, *ancestors(name))) for name in seen.layers):
                return code
        return None


def _finding(rule: Rule, seen: Seen, at: Occasion, mended: bool, cause: str | None) -> Finding:
    names = [layer.name for layer in at.layers]
    parts = list(seen.layers)
    if set(seen.layers) <= set(names) and not seen.worst_first:
        parts = modules_of(seen.layers, names)
    return Finding(
        code=rule.code,
        level=seen.level or rule.level,
        title=seen.title or rule.title,
        layers=tuple(seen.layers),
        where=listing(parts) + f" ({len(seen.layers)} layers)" * (len(seen.layers) > len(parts)),
        stage=at.stage,
        step=at.step,
        seen=seen.event if isinstance(seen.event, str) else seen.event(seen.layers),
        why=seen.why or rule.why,
        fix=seen.fix or rule.fix,
        link=LINK.format(code=rule.code),
        quiet=f'{at.setting.caller}(ignore=["{rule.code}"])',
        mended=mended,
        follows=cause,
    )
