"""The site builds without a warning, and what its pages say of the project's files is so."""

from __future__ import annotations

import html
import inspect
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

import lightning_bn
from lightning_bn.rules import RULES
from lightning_bn.rules.exported import EXPORT_RULES

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


def test_site_has_every_page(site: Path) -> None:
    """Each page is there."""
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix("")
        assert (site / (name.parent if name.name == "index" else name) / "index.html").is_file()


@pytest.mark.parametrize("name", lightning_bn.__all__)
def test_every_public_name_has_a_page(site: Path, name: str) -> None:
    """It is headed by the public name, has the signature, and is in the reference's list and in the navigation."""
    public = getattr(lightning_bn, name)
    text = (site / "reference" / name / "index.html").read_text()
    assert f'id="lightning_bn.{name}"' in text
    words = html.unescape(re.sub(r"<[^>]*>", "", text))
    signature = re.search(rf"^{name}\((.*?)\)(?: -> .*)?$", words, re.MULTILINE | re.DOTALL)
    assert signature is not None
    for parameter in inspect.signature(public).parameters:
        assert re.search(rf"\b{parameter}\b", signature[1]), parameter
    for field in fields(public) if is_dataclass(public) else ():
        documented = f'id="lightning_bn.{name}.{field.name}"' in text or f" {field.name}: " in public.__doc__
        assert documented or field.name.startswith("_"), field.name
    # A doctest that is not taken for one is rendered as a quotation.
    assert "<blockquote>" not in text
    for page in ("reference", "rules"):
        assert re.search(rf'href="[./]*(reference/)?{name}/"', (site / page / "index.html").read_text())


@pytest.mark.parametrize("code", [*RULES, *EXPORT_RULES])
def test_every_rule_has_a_page(site: Path, code: str) -> None:
    """It is in the navigation, of its two programs the reader sees which is wrong, and it has what mistakes cost."""
    text = (site / "rules" / code.lower() / "index.html").read_text()
    assert re.findall(r'<span class="filename">(.*?)</span>', text) == ["This is reported", "This is not"]
    assert ("Accuracy with " in text) == (code in RULES)
    assert f'href="{code.lower()}/"' in (site / "rules" / "index.html").read_text()


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
