"""``make demo``: what it names, what it repairs, and the page that it points to."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import limit

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the demo prints, and the folder in which it was run."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=limit(250), check=True)
    return done.stdout, folder


def test_the_mistake_and_the_sick_layer_are_named(demo: tuple[str, Path]) -> None:
    """The block that was left in eval mode is named with its fix; the layer that was switched off with the step."""
    out, _ = demo
    assert "where: model.1; train, step 0" in out
    assert "fix:   self.model[1].train()" in out
    assert re.search(r"Sick: model\.2\.2: share of channels that are dead 1 .* since step 40\.", out)


def test_it_fits_on_a_screen(demo: tuple[str, Path]) -> None:
    """Forty lines of a terminal of 80 columns, those that it wraps counted as often as it does."""
    out, _ = demo
    assert sum(max(1, -(-len(line) // 80)) for line in out.splitlines()) <= 40


def test_averaged_weights_are_repaired_where_they_need_it(demo: tuple[str, Path]) -> None:
    """Weights averaged with a decay of 0.995 gain most of their accuracy, and with 0.98 next to nothing."""
    out, _ = demo
    means = {
        row[0]: [float(cell) for cell in row[1:]]
        for row in re.findall(r"^ +(0\.9\d+) +([\d.]+) \(.*?\) +([\d.]+)", out, re.M)
    }
    assert means["0.995"][1] - means["0.995"][0] > 50
    assert abs(means["0.98"][1] - means["0.98"][0]) < 5


def test_the_command_opens_the_run(demo: tuple[str, Path]) -> None:
    """The command in the last line writes the page, also where a layer's scale is 0."""
    out, folder = demo
    run = re.search(r"lightning-bn report (\S+),", out).group(1)
    done = subprocess.run(
        [sys.executable, "-m", "lightning_bn", "report", run], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").stat().st_size > 100_000


def test_the_readme_shows_what_the_demo_prints(demo: tuple[str, Path]) -> None:
    """The README's verdict is the demo's, line by line."""
    out, _ = demo
    shown = re.search(r"```text\n(Sick:.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert [line for line in shown.splitlines() if line and line not in out.splitlines()] == []
