"""The page's modules that need no browser, by Node's own test runner."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NODE = shutil.which("node")
TESTS = sorted(Path(__file__).parent.glob("*.test.mjs"))


@pytest.mark.skipif(NODE is None, reason="no node: apt-get install nodejs")
@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_a_module_holds_what_its_tests_say(path: Path) -> None:
    """Each `*.test.mjs` passes; a failure shows what Node says of it."""
    done = subprocess.run([str(NODE), "--test", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
