"""Says what became of the batch norms of an exported program: of the file alone, or beside the checkpoint it is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_bn.checkpoints.health import CheckpointHealth, HealthFinding, damage, judged
from lightning_bn.checkpoints.norms import norms_in, printable, tensors_in
from lightning_bn.checkpoints.reading import CheckpointRefusedError, archive_of, plainly, read_contents
from lightning_bn.exports.export_file import is_export, read_export
from lightning_bn.exports.onnx_file import read_onnx
from lightning_bn.exports.program import Program, loaded
from lightning_bn.exports.reference import Difference, compare
from lightning_bn.exports.script_file import is_script, read_script
from lightning_bn.rules.exported import EXPORT_RULES


def is_program(path: Path) -> bool:
    """Whether a file is an exported program: ONNX by its name, ``torch.export`` and TorchScript by what is in it."""
    if path.suffix == ".onnx":
        return path.is_file()
    archive = archive_of(path)
    return archive is not None and (is_export(archive) or is_script(archive))


def read_program(path: Path) -> Program:
    """Return what is in an exported program; nothing in it runs.

    Raises:
        CheckpointRefusedError: it is damaged, or of ONNX and onnx is not installed.
    """
    with plainly(path):
        if path.suffix == ".onnx":
            return read_onnx(path)
        archive = archive_of(path)
        if archive is None:
            raise ValueError("no program")
        return read_export(archive) if is_export(archive) else read_script(archive)


def inspect_export(path: Path | str, reference: Path | str | None = None) -> CheckpointHealth:
    """Look at the batch norms of an exported program: which it still has and in which mode, their statistics, and
    whether anything in it is random or writes statistics.

    Args:
        path: of ONNX, ``torch.export`` or TorchScript.
        reference: the checkpoint that it was exported from. Statistics that were folded into weights are recovered by
            it and compared.

    Raises:
        FileNotFoundError: no such file.
        CheckpointRefusedError: a file is damaged, or the reference has no batch norm.
    """
    path = Path(path)
    program = read_program(path)
    archive = archive_of(path)
    found = [*damage(archive.damaged() if archive else ()), *_of_program(program), *_unjudged(program)]
    if reference is not None:
        with plainly(path):
            found += _beside(program, Path(reference))
    elif folded := [use.folded for use in program.layers if use.folded]:
        text = (
            f"{len(folded)} batch norms are folded into the layers before them: {_named(folded)}. With --reference "
            f"BEST.ckpt their statistics are recovered and compared."
        )
        found.append(HealthFinding("info", None, "", text))
    modes = {use.name: "batch" if use.by_batch else "running" for use in program.uses}
    return judged(program.norms, found, modes)


def _of_program(program: Program) -> Iterator[HealthFinding]:
    by_batch = [use.name for use in program.uses if use.by_batch]
    if by_batch:
        seen = f"{len(by_batch)} of {len(program.uses)} batch norms normalise with their batch: {_named(by_batch)}"
        yield _finding("BN401", seen)
    if program.random:
        seen = f"{len(program.random)} operations draw random numbers at each run: {_named(program.random)}"
        yield _finding("BN402", seen)
    yield from _of_numbers(program)
    writing = [use.name for use in program.uses if use.writes]
    if writing:
        yield _finding("BN404", f"each run moves the running statistics of {_named(writing)}")
    if not program.uses and not any(use.folded for use in program.layers):
        text = f"this {program.kind} program has no batch norm that can be told from other arithmetic."
        yield HealthFinding("info", None, "", text)


def _of_numbers(program: Program) -> Iterator[HealthFinding]:
    """Look for weights and biases that are not finite, or what a converter makes of that."""
    spoiled = []
    for place, use in enumerate(program.layers):
        name = printable(use.name or f"layer {place}")
        try:
            values = [loaded(leaf) for leaf in (use.weight, use.bias) if leaf is not None]
        except Exception as error:  # the file that the numbers are in is missing, or damaged
            yield HealthFinding("warning", None, name, f"its numbers can't be read ({printable(error)}): not judged.")
            continue
        if any(not bool((each.abs() < _LARGEST_HALF).all()) for each in values if each.is_floating_point()):
            spoiled.append(name)
    if spoiled:
        seen = f"weights or biases are not finite, or float16's largest number (65504), in {_named(spoiled)}"
        yield _finding("BN405", seen)


_LARGEST_HALF = 65504.0


def _unjudged(program: Program) -> Iterator[HealthFinding]:
    for each in program.unjudged:
        yield HealthFinding("warning", None, each.name, each.why)
    for use in program.uses:
        if use.by_batch is None:
            text = "whether it normalises with its batch, the program decides as it runs: not judged."
            yield HealthFinding("warning", None, printable(use.name), text)


def _beside(program: Program, reference: Path) -> Iterator[HealthFinding]:
    content = read_contents(reference).value
    _, unjudged = norms_in(content)
    for each in unjudged:
        yield HealthFinding("warning", None, each.name, f"of the reference, {each.why}")
    compared = [_compared(program, part) for part in _models(content)]
    if not any(compared):
        raise CheckpointRefusedError(f"{reference} has no batch norm to compare with.")
    # Of a checkpoint with averaged weights beside the others, whichever was exported.
    best = min(filter(None, compared), key=_faults)
    absent = []
    for found in best:
        if isinstance(found, str):
            absent.append(found)
        elif not found.agrees:
            yield _finding("BN403", _words(found), found.name)
    if absent:
        text = (
            f"{_named(absent)} of the reference: neither in the program, nor folded into a weight that is the "
            f"reference's times one number a channel. Not compared."
        )
        yield HealthFinding("warning", None, "", text)


def _compared(program: Program, content: Any) -> list[Difference | str]:
    return list(compare(program, {norm.name: norm for norm in norms_in(content)[0]}, tensors_in(content)))


def _faults(compared: list[Difference | str]) -> int:
    return sum(isinstance(each, str) or not each.agrees for each in compared)


def _models(content: Any) -> list[Any]:
    """The parts of a checkpoint that are each a model's: its own entries, or each of several state_dicts in it."""
    if isinstance(content, Mapping) and not any(str(key).endswith("running_mean") for key in content):
        parts = [part for part in content.values() if norms_in(part)[0]]
        return parts if len(parts) > 1 else [content]
    return [content]


def _words(found: Difference) -> str:
    where = "recovered from the weight that it is folded into" if found.folded else "as the program has it"
    cap = f" Several variances are just {found.capped:g}, as a converter caps them." if found.capped is not None else ""
    return (
        f"{where}, the mean is up to {found.mean_shift:.3g} standard deviations from the reference's, and the variance "
        f"up to {found.log_variance_ratio:.3g} in its logarithm.{cap}"
    )


def _finding(code: str, seen: str, layer: str = "") -> HealthFinding:
    rule = EXPORT_RULES[code]
    return HealthFinding(rule.level, code, layer, f"{seen.rstrip('.')}. {rule.why} Fix: {rule.fix}")


def _named(names: Any) -> str:
    kept = [printable(name) for name in dict.fromkeys(names)]
    return ", ".join(kept[:4]) + f" and {len(kept) - 4} more" * (len(kept) > 4)
