"""What type checkers say from a user's side. `make types` asks mypy about the same program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the packages that Python 3.10 gets have other types")
def test_examples_and_a_user_program_are_clean() -> None:
    """pyright finds nothing in the examples, and just the mistakes that user_program.py makes on purpose."""
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout
    assert said.splitlines() == ["0 errors, 0 warnings, 0 notes"]
