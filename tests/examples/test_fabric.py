"""The Fabric example, as its reader runs it: two processes, started by the script itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from digits import digits
from limits import limit

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "fabric.py"


def run(*arguments: str) -> str:
    """Run the example in a session of its own, which is ended as a whole if it hangs."""
    command = [sys.executable, str(EXAMPLE), *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit(200))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output
    return output


def test_module_watch_and_recalibrate_in_two_processes() -> None:
    """watch finds no mistake, recalibrate sees the data of both, the ranks end with the same buffers, the model has
    learned."""
    output = run("--epochs", "1")
    assert "2 processes, 1 epochs; watch found: nothing" in output
    share = -(-len(digits()[0].dataset) // 2)  # of each rank; the last one is filled up
    assert f"recalibrated from {2 * (share // 32) * 32} images" in output
    assert "buffers that differ between ranks: 0" in output
    (recalibrated,) = re.findall(r"recalibrated +(\d\.\d+)\n", output)
    assert float(recalibrated) > 0.2  # of ten classes
