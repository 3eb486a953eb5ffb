"""What an accelerator carries out in a step, as torch's profiler saw it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from turns import Step

STEPS = 10


def profile_steps(steps: dict[str, Step]) -> str:
    """Return a table of the kernels in a step, and of how often the host waited for a stream in all `STEPS` steps."""
    header = f"| {STEPS} steps | kernels a step | StreamSynchronize calls | copies to the host |"
    lines = [header, "|---|---:|---:|---:|"]
    for name, step in steps.items():
        for _ in range(3):  # a first batch may set things up
            step()
        events = _events(step)
        kernels = sum(event.get("cat") == "kernel" for event in events)
        waits = sum(event.get("name", "").endswith("StreamSynchronize") for event in events)
        copies = sum(event.get("cat") == "gpu_memcpy" and "DtoH" in event["name"] for event in events)
        lines.append(f"| {name} | {kernels / STEPS:.1f} | {waits} | {copies} |")
    return "\n".join(lines)


def _events(step: Step) -> list[dict[str, Any]]:
    with torch.profiler.profile() as profiler:  # of the host and of every accelerator that it knows
        for _ in range(STEPS):
            step()
        torch.accelerator.synchronize()  # waits for the device, and not for a stream
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events: list[dict[str, Any]] = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    return events
