"""The site builds without a warning, and what its pages say of the project's files is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_bn

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as ``make docs`` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_has_every_page_and_every_public_name(site: Path) -> None:
    """Each page is there, and the API page documents all of __all__."""
    for page in DOCS.glob("*.md"):
        assert (site / ("" if page.stem == "index" else page.stem) / "index.html").is_file()
    text = (site / "api" / "index.html").read_text()
    missing = [name for name in lightning_bn.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == []
    # A doctest that is not taken for one is rendered as a quotation.
    assert "<blockquote>" not in text


def test_compatibility_is_that_of_the_project() -> None:
    """The table's versions are those of pyproject.toml and constraints.txt."""
    bounds = (ROOT / "pyproject.toml").read_text()
    lines = [
        line.split(";")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if '< "3.11"' not in line
    ]
    tested = dict(line.split("==") for line in lines if "==" in line)
    rows = re.findall(
        r"^\| (\w+)[^|]*\| ([\d.]+) \| ([\d.]+) \|$", (DOCS / "compatibility.md").read_text(), re.MULTILINE
    )
    packages = [row for row in rows if row[0] != "Python"]
    assert len(packages) == len(rows) - 1 == 6
    for name, least, version in packages:
        assert re.search(rf'"{name}(\[\w+\])?>={re.escape(least)}"', bounds), name
        assert tested[name] == version
    (python,) = (row[1] for row in rows if row[0] == "Python")
    assert f'requires-python = ">={python}"' in bounds


def test_walk_is_that_of_the_example() -> None:
    """The commands on the page are those that the example's own test runs."""
    config = (ROOT / "examples" / "cli" / "config.yaml").read_text()
    commands = [line.removeprefix("# ") for line in config.splitlines() if line.startswith("# ")]
    assert "\n".join(commands) in (DOCS / "cli.md").read_text()


def test_configs_on_the_page_are_yaml_of_names_that_exist() -> None:
    """Every lightning_bn class in a YAML block is public and takes the arguments that are given to it."""
    found = []

    def visit(node: object) -> None:
        if isinstance(node, dict):
            path = str(node.get("class_path", ""))
            if path.startswith("lightning_bn."):
                found.append((path.removeprefix("lightning_bn."), node.get("init_args", {})))
            for value in node.values():
                visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    for block in re.findall(r"```yaml\n(.*?)```", (DOCS / "cli.md").read_text(), re.DOTALL):
        visit(yaml.safe_load(block))
    assert len(found) >= 6
    for name, arguments in found:
        assert name in lightning_bn.__all__
        plain = {key: value for key, value in arguments.items() if not isinstance(value, dict)}
        if name != "ConvertBatchNorm":
            getattr(lightning_bn, name)(**plain)


def test_a_release_is_told_everywhere() -> None:
    """CITATION.cff has what its format requires; it, the package and the newest section of CHANGELOG.md agree on the
    version, which is the check that a release needs."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation["version"] == lightning_bn.__version__ == released[0]
