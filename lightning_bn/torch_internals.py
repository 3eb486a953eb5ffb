"""The one place where this package touches parts of torch that are not public.

Each function says why nothing public will do, and what it answers where the private part is gone.
"""

from __future__ import annotations

import torch

__all__ = ["in_backward"]

_graph_task_id = getattr(torch._C, "_current_graph_task_id", None)


def in_backward() -> bool:
    """Tell whether this code runs inside a backward pass.

    A forward inside backward is the recomputation of activation checkpointing. Nothing public says so: the first pass of
    reentrant checkpointing runs under ``no_grad`` and the recomputation does not, so the grad mode points at the wrong one of the two.
    Without the private function (or while compiling, where torch handles recomputation itself) the answer is False, and a
    checkpointed layer counts its batches twice, as torch's own does.
    """
    if torch.compiler.is_compiling() or _graph_task_id is None:
        return False
    return bool(_graph_task_id() != -1)
