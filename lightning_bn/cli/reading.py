"""``lightning-bn inspect`` and ``lightning-bn rules``: what needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from lightning_bn.checkpoints.health import (
    CheckpointHealth,
    LayerHealth,
    StateDrift,
    compare_checkpoints,
    inspect_checkpoint,
)
from lightning_bn.checkpoints.reading import CheckpointRefusedError
from lightning_bn.cli.output import FINDINGS, OK, RefusedError, UsageError, coloured, print_json, print_table
from lightning_bn.exports.inspection import inspect_export, is_program
from lightning_bn.rules import RULES
from lightning_bn.rules.exported import EXPORT_RULES
from lightning_bn.rules.page import rule_page
from lightning_bn.tables import text_table


def inspect(checkpoints: Sequence[Path], *, reference: Path | None = None, json: bool = False) -> int:
    """Say what is in the batch-norm layers of one file, or how far they moved from one checkpoint to the other."""
    if not 1 <= len(checkpoints) <= 2:
        raise UsageError(f"inspect takes one checkpoint, or two to compare; here are {len(checkpoints)}.")
    try:
        if len(checkpoints) == 2:
            if reference is not None:
                raise UsageError("inspect takes two checkpoints, or an exported program and its --reference.")
            drift = compare_checkpoints(*checkpoints)
            print_json(drift.as_dict()) if json else _print_drift(drift)
            return OK
        if is_program(checkpoints[0]):
            health = inspect_export(checkpoints[0], reference)
        elif reference is not None:
            raise UsageError(
                f"--reference is for an exported program; two checkpoints: inspect {checkpoints[0]} {reference}"
            )
        else:
            health = inspect_checkpoint(checkpoints[0])
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    except CheckpointRefusedError as error:
        raise RefusedError(str(error)) from error
    print_json(health.as_dict()) if json else _print_health(health)
    return OK if health.sound else FINDINGS


def rules(code: str | None = None, *, full: bool = False, json: bool = False) -> int:
    """List the rules about batch norm, or explain one."""
    every = {**RULES, **EXPORT_RULES}
    if code is not None and code.upper() not in every:
        near = get_close_matches(code.upper(), every, n=1, cutoff=0.7)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"there is no rule {code}.{hint} The rules are {', '.join(every)}.")
    chosen = list(every.values()) if code is None else [every[code.upper()]]
    if json:
        names = ("code", "level", "title", "why", "mendable")
        print_json([{**{name: getattr(rule, name) for name in names}, "fix": str(rule.fix)} for rule in chosen])
    elif code is None:
        header, *lines = text_table(("rule", "level", "what"), [(r.code, r.level, r.title) for r in chosen], left=3)
        print(header)
        for rule, line in zip(chosen, lines, strict=True):
            print(line.replace(rule.level, coloured(rule.level, rule.level), 1))
        print("\nOne of them, with a wrong program and its fix: lightning-bn rules BN104")
    else:
        (rule,) = chosen
        print(f"{rule.code} ({coloured(rule.level, rule.level)}): {rule.title}\n\nWhy: {rule.why}")
        print(f"Fix: {rule.fix}" if rule.fix.code else "Fix: the finding says it, since it depends on what was seen.")
        if rule.mendable:
            print(f"ModeCheck(fix=['{rule.code}']) fixes it at once.")
        print(f"\n{rule_page(rule.code, full=full)}\n")
        if rule.code in RULES:
            print("In these programs fit(module) trains a LightningModule with a ModeCheck, and returns its findings.")
        if not full:
            print(f"In detail: lightning-bn rules {rule.code} --full")
    return OK


def _print_health(health: CheckpointHealth) -> None:
    for finding in health.findings:
        about = " ".join(part for part in (finding.rule, finding.layer) if part)
        print(f"{coloured(finding.level, finding.level)}: {about + ': ' if about else ''}{finding.text}")
    counts = [
        f"{len(each)} {what}{'s' * (len(each) != 1)}"
        for each, what in ((health.layers, "batch-norm layer"), (health.findings, "finding"))
    ]
    print(f"{', '.join(counts)}." + "\n" * bool(health.layers))
    worst = {finding.layer: place for place, finding in reversed(list(enumerate(health.findings)))}
    layers = sorted(health.layers, key=lambda layer: worst.get(layer.name, len(worst) + len(health.findings)))
    header = (
        "layer",
        "channels",
        "batches",
        "mean",
        "variance",
        "dead",
        "exploded",
        "not finite",
        "weight",
        "bias",
        "dead weights",
        "averaging",
        "dtype",
    )
    modes = any(layer.mode for layer in layers)  # of an exported program
    rows = [(*_cells(layer), *((layer.mode or "-",) * modes)) for layer in layers]
    print_table((*header, *(("normalises with",) * modes)), rows)


def _cells(layer: LayerHealth) -> tuple[str, ...]:
    return (
        layer.name or "(the model)",
        str(layer.channels),
        "-" if layer.batches_tracked is None else str(layer.batches_tracked),
        _range(layer.mean_min, layer.mean_max),
        _range(layer.var_min, layer.var_max),
        str(layer.dead),
        str(layer.exploded),
        str(layer.nonfinite),
        _range(layer.weight_min, layer.weight_max),
        _range(layer.bias_min, layer.bias_max),
        "-" if layer.dead_weights is None else str(layer.dead_weights),
        layer.averaging or "torch's",
        layer.dtype,
    )


def _range(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.3g} to {high:.3g}"


def _print_drift(drift: StateDrift) -> None:
    print("From the first to the second; the mean in units of the first's standard deviation.")
    for names, what in (
        (drift.only_first, "Only in the first"),
        (drift.only_second, "Only in the second"),
        (drift.other_size, "Of another number of channels"),
    ):
        if names:
            print(f"{what}: {', '.join(names)}.")
    for each in drift.unjudged:
        print(f"{coloured('warning', 'warning')}: {each}")
    figures = ("mean_shift_max", "mean_shift_rms", "log_variance_ratio_max", "log_variance_ratio_rms")
    rows = [
        (layer.name or "(the model)", *(f"{getattr(layer, name):.3g}" for name in figures)) for layer in drift.layers
    ]
    print_table(("layer", "mean shift max", "rms", "log var ratio max", "rms"), rows)
