"""Runs an exported program beside the model that it was exported from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bn.exports.exporting import exporting
from lightning_bn.rules.exported import EXPORT_RULES
from lightning_bn.rules.finding import Finding
from lightning_bn.rules.register import LINK


def check_export(
    run: Any,
    reference: nn.Module | Callable[..., Any],
    batch: Any,
    *,
    tolerance: float = 0.01,
    ignore: Collection[str] = (),
) -> list[Finding]:
    """Return what is wrong with the answers of an exported program: one that depends on what else is in its batch, two
    calls that differ, an answer that is not the reference's in eval mode, or not finite, buffers that move.

    The program is called with `batch` twice, and with a batch of the first sample alone, as often as `batch` has
    samples.

    Args:
        run: an onnxruntime session, a compiled model, a loaded program, or any function of the batch.
        reference: the model, which runs in eval mode and is left as it was; or a function of the batch.
        batch: a tensor (N, ...) with N >= 2 samples that differ; or a tuple or dict of such, the arguments.
        tolerance: share of the largest answer below which a difference is taken for rounding.
        ignore: codes of rules.

    Raises:
        ValueError: a batch of one sample, or of equal ones; an unknown code.

    Example:
        >>> import copy, torch
        >>> from lightning_bn import check_export
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        >>> program = copy.deepcopy(model).train()  # stands for one that was exported so
        >>> [finding.code for finding in check_export(program, model, torch.randn(8, 3))]
        ['BN401', 'BN404', 'BN403']
    """
    unknown = sorted(set(ignore) - set(EXPORT_RULES))
    if unknown:
        known = ", ".join(EXPORT_RULES)
        raise ValueError(f"check_export(ignore={list(ignore)!r}): there is no rule {unknown[0]}; there are {known}.")
    alone = _alone(batch)
    call = _callable(run)
    own = exporting(reference) if isinstance(reference, nn.Module) else nullcontext()
    with torch.no_grad():
        with own:
            expected = _answers(_call(reference, batch))
        buffers = list(run.buffers()) if isinstance(run, nn.Module) and run is not reference else []
        before = [buffer.clone() for buffer in buffers]
        first, second, lonely = (_answers(_call(call, each)) for each in (batch, batch, alone))
    moved = sum(
        not torch.allclose(one, other, 0, 0, equal_nan=True) for one, other in zip(buffers, before, strict=True)
    )
    seen = _seen(first, second, lonely, expected, tolerance, moved)
    return [_finding(code, text) for code, text in seen if code not in ignore]


def _seen(
    first: list[Tensor],
    second: list[Tensor],
    lonely: list[Tensor],
    expected: list[Tensor],
    tolerance: float,
    moved: int,
) -> Iterator[tuple[str, str]]:
    infinite = [int((~each.isfinite()).sum()) for each in first]
    if any(infinite):
        also = "; so does the reference" if any(not bool(each.isfinite().all()) for each in expected) else ""
        yield "BN405", f"{sum(infinite)} of {sum(each.numel() for each in first)} answers are NaN or infinite{also}"
    steady = _apart(first, second)
    if steady > tolerance:
        yield "BN402", f"two calls with one batch differ by {_share(steady)}"
    else:
        rows = [(one[0], other[0]) for one, other in zip(first, lonely, strict=True) if one.dim() and other.dim()]
        mates = _apart([one for one, _ in rows], [other for _, other in rows])
        if mates > tolerance:
            yield "BN401", f"the answer to one sample changes by {_share(mates)} with the others in its batch"
    if moved:
        yield "BN404", f"three calls moved {moved} of its buffers"
    if [each.shape for each in first] != [each.shape for each in expected]:
        shapes = [[tuple(each.shape) for each in answers] for answers in (first, expected)]
        yield "BN403", f"its answers have the shapes {shapes[0]}, the reference's {shapes[1]}"
    elif (distance := _apart(first, expected)) > tolerance:
        yield "BN403", f"its answers are {_share(distance)} from the reference's in eval mode"


def _apart(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest difference between answers, as a share of the largest one; what is not finite is left out."""
    largest = 0.0
    for one, other in zip(some, others, strict=True):
        finite = one.isfinite() & other.isfinite()
        if bool(finite.any()):
            scale = other[finite].abs().max().clamp(min=1e-30)
            largest = max(largest, float((one - other)[finite].abs().max() / scale))
    return largest


def _share(value: float) -> str:
    return f"{100 * value:.3g} % of the largest"


def _finding(code: str, seen: str) -> Finding:
    rule = EXPORT_RULES[code]
    return Finding(
        code=code,
        level=rule.level,
        title=rule.title,
        layers=(),
        where="the exported program",
        stage="check",
        step=0,
        seen=seen,
        why=rule.why,
        fix=rule.fix,
        link=LINK.format(code=code),
        quiet=f"check_export(..., ignore=[{code!r}])",
    )


def _callable(run: Any) -> Callable[..., Any]:
    if not (hasattr(run, "get_inputs") and hasattr(run, "run")):
        return run  # type: ignore[no-any-return]
    names = [each.name for each in run.get_inputs()]  # an onnxruntime session

    def call(*args: Tensor, **kwargs: Tensor) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return run.run(None, {name: value.detach().cpu().numpy() for name, value in given.items()})

    return call


def _call(run: Callable[..., Any], batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return run(**batch)
    return run(*batch) if isinstance(batch, (tuple, list)) else run(batch)


def _alone(batch: Any) -> Any:
    """The first sample, as often as there are samples."""
    if isinstance(batch, Mapping):
        return {name: _alone(each) for name, each in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(_alone(each) for each in batch)
    if not isinstance(batch, Tensor) or not batch.dim():
        return batch
    if len(batch) < 2 or bool((batch == batch[:1]).all()):
        raise ValueError(
            f"check_export(run, reference, batch) with a batch of {tuple(batch.shape)}: it takes two samples or more "
            "that differ, as in torch.randn(8, 3, 32, 32); whether they answer for each other is to be seen."
        )
    return batch[:1].expand_as(batch).contiguous()


def _answers(output: Any) -> list[Tensor]:
    """The numbers in whatever a program returns, in float64 on the CPU."""
    if isinstance(output, Mapping):
        return [each for value in output.values() for each in _answers(value)]
    if isinstance(output, (tuple, list)):
        return [each for value in output for each in _answers(value)]
    try:
        found = torch.as_tensor(output)
    except (TypeError, ValueError, RuntimeError):
        return []
    return [found.detach().cpu().double()] if not found.is_complex() else [torch.view_as_real(found).cpu().double()]
