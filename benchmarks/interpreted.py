"""What a step has Python do: exact, the same on every machine, and different from one version of Python to the next."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def count_python(step: Callable[[], object]) -> tuple[int, int]:
    """Return how many Python functions one call of `step` enters, generators that go on included, and how many
    bytecodes it executes."""
    calls = bytecodes = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal calls, bytecodes
        if event == "call":
            frame.f_trace_lines, frame.f_trace_opcodes = False, True
            calls += 1
        elif event == "opcode":
            bytecodes += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        step()
    finally:
        sys.settrace(before)
    return calls, bytecodes
