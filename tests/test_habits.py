"""What a public host needs of the repository: forms, hooks and a workflow that are well formed and name what is
there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parent.parent
FORMS = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_forms_are_yaml(path: Path) -> None:
    """Each file can be read, and says something."""
    assert yaml.safe_load(path.read_text())


def test_the_workflow_runs_targets_that_exist_on_the_versions_that_are_declared() -> None:
    """Every ``make`` target of the workflow is in the Makefile, and its Pythons are among the classifiers."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = workflow["jobs"]
    named = {entry["target"] for entry in jobs["bounds"]["strategy"]["matrix"]["include"]} | {"test"}
    assert named <= targets
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    declared = {line.rsplit(" ", 1)[1] for line in classifiers if re.search(r":: 3\.\d+$", line)}
    assert set(jobs["test"]["strategy"]["matrix"]["python"]) <= declared


def test_bounds_and_oldest_agree() -> None:
    """constraints-oldest.txt holds exactly the lower bounds of the dependencies and of the command line."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = dict(
        line.split("==") for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if "==" in line
    )
    for requirement in project["dependencies"] + project["optional-dependencies"]["cli"]:
        name, bound = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement).groups()
        assert re.fullmatch(re.escape(bound) + r"(\.0)*", oldest[name]), name
