"""The house as a whole: what is public, what an import costs, and who may know whom."""

from __future__ import annotations

import ast
import doctest
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_bn

PACKAGE = Path(lightning_bn.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
HEAVY = (
    "torch",
    "lightning",
    "pytorch_lightning",
    "torchmetrics",
    "tensorboard",
    "matplotlib",
    "numpy",
    "pandas",
    "tqdm",
)


def test_importing_is_light() -> None:
    """import lightning_bn brings in none of the packages that take seconds."""
    code = f"import sys, lightning_bn; print(*set(sys.modules) & set({HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_all_is_what_a_user_can_see() -> None:
    """__all__, dir() and the attributes agree, and every lazy name is there when asked for."""
    assert sorted(lightning_bn.__all__) == sorted(set(lightning_bn.__all__))
    assert set(dir(lightning_bn)) == {*lightning_bn.__all__, "__version__"}
    assert set(lightning_bn._LAZY) == set(lightning_bn.__all__)
    for name in lightning_bn.__all__:
        assert getattr(lightning_bn, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Windows'"):
        lightning_bn.Windows  # noqa: B018


def test_public_classes_are_of_the_package() -> None:
    """A pickle of a whole model names `lightning_bn.Window`, and not the file in which the class happens to lie."""
    for name in lightning_bn.__all__:
        public = getattr(lightning_bn, name)
        if isinstance(public, type):
            assert public.__module__ == "lightning_bn", name


@pytest.mark.parametrize("name", lightning_bn.__all__)
def test_docstring_examples_run(name: str) -> None:
    """pytest collects the examples of a module's own objects alone; a public class says that it is the package's."""
    public = getattr(lightning_bn, name)
    examples = doctest.DocTestFinder().find(public, name, module=False, globs={"torch": torch, "nn": nn})
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for each in examples:
        runner.run(each)
    assert not runner.failures


def imports(path: Path) -> set[str]:
    """Return the modules a file imports when it is imported, and for types; those in functions are not."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(
                f"{node.module}.{alias.name}" if node.module == "lightning_bn" else str(node.module)
                for alias in node.names
            )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def own(path: Path) -> set[str]:
    """Return which of this package's modules a file imports, without the package's name."""
    return {name.removeprefix("lightning_bn.") for name in imports(path) if name.startswith("lightning_bn.")}


# Who may import whom, by folder or file at the top, from docs/design.md; what is not here may import all but the
# adapters.
GROUND = {
    "torch_internals",
    "buffers",
    "discovery",
    "choices",
    "modes",
    "moments",
    "outermost",
    "channel_moments",
    "tables",
    "grids",
    "sharding",
    "error_boundary",
    "set_in_use",
    "torchscript",
}
MAY_IMPORT: dict[str, set[str]] = {
    "journal": {"grids"},  # nor torch: see the test below
    "dashboard": {"journal", "grids"},
    "torch_internals": set(),
    "buffers": {"torch_internals"},
    "discovery": {"torch_internals"},
    "error_boundary": set(),
    "choices": {"discovery", "error_boundary"},
    "set_in_use": set(),
    "torchscript": set(),
    "tables": set(),
    "grids": set(),
    "modes": {"torch_internals", "buffers", "discovery"},
    "outermost": {"torch_internals"},
    "moments": {"torch_internals"},
    "channel_moments": {"torch_internals", "moments"},
    "sharding": {"torch_internals", "discovery"},
    "averaging": {"moments"},
    "layers": GROUND | {"averaging"},
    "ranks": GROUND | {"averaging", "layers"},
    "sets": GROUND | {"averaging", "layers"},
    "recalibration": GROUND | {"averaging", "layers", "ranks"},
    "live_data": GROUND | {"recalibration"},
    "activations": GROUND | {"averaging", "layers", "ranks"},
    "rules": GROUND | {"averaging", "layers", "ranks"},
    "comparison": GROUND | {"averaging", "layers", "ranks"},
    "checkpoints": GROUND | {"averaging", "layers", "rules"},
    "exports": GROUND | {"averaging", "checkpoints", "rules"},
}
# By adapter, the adapters above it. Callbacks know the page as a file, which they give to loggers.
ADAPTERS = {"callbacks": ("cli", "__main__"), "cli": ("__main__",), "__main__": ()}
# What both of Lightning's packages share, or have alike; all else of theirs goes through both_lightnings.py.
EITHER = {
    "lightning.pytorch.cli",
    "lightning.pytorch.trainer.states",
    "lightning.pytorch.utilities",
    "pytorch_lightning.cli",
}
CALLBACKS = {
    "callbacks.activation_stats",
    "callbacks.comparison",
    "callbacks.conversion",
    "callbacks.drift_monitor",
    "callbacks.freezing",
    "callbacks.mode_check",
    "callbacks.recalibration",
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_other_modules_take_has_no_underscore(path: Path) -> None:
    """An underscore says what a module keeps for itself; `__all__` is for the names that packages give to users."""
    tree = ast.parse(path.read_text())
    declares = any("__all__" in _defined(node) for node in tree.body)
    assert not declares or path.name == "__init__.py"
    module = ".".join(("lightning_bn", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    assert not {name for name in TAKEN.get(module, ()) if name.startswith("_")}


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def _taken() -> dict[str, set[str]]:
    """By module, the names that other modules of the package import from it, submodules aside."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lightning_bn"):
                module = PACKAGE.parent / str(node.module).replace(".", "/")
                names = {
                    a.name
                    for a in node.names
                    if not (module / a.name).is_dir() and not (module / f"{a.name}.py").exists()
                }
                found.setdefault(str(node.module), set()).update(names)
    return found


TAKEN = _taken()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_one_way(path: Path) -> None:
    """No room imports from one above it; lightning is known to callbacks/ and cli/ only, and its classes to
    one file; callbacks don't know each other."""
    place = path.relative_to(PACKAGE)
    folder = place.parts[0].removesuffix(".py")
    known = {module.split(".")[0] for module in own(path)} - {folder}
    if folder in ADAPTERS:
        assert not known & set(ADAPTERS[folder])
    if folder not in ADAPTERS:
        assert not {module.split(".")[0] for module in imports(path)} & {"lightning", "pytorch_lightning"}
        assert known <= MAY_IMPORT[folder]
    elif place.name not in ("both_lightnings.py", "lightning_internals.py"):
        assert (
            not {name for name in imports(path) if name.startswith(("lightning.pytorch", "pytorch_lightning"))} - EITHER
        )
    if folder == "callbacks":
        assert not own(path) & (CALLBACKS - {str(place.with_suffix("")).replace("/", ".")})


def test_no_circle() -> None:
    """No file imports itself by way of others, types included."""
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in FILES}
    graph = {name: own(path) & files.keys() for name, path in files.items()}
    # TopologicalSorter.prepare raises a CycleError that names the circle.
    TopologicalSorter(graph).prepare()


def test_the_design_names_the_files_that_there_are() -> None:
    """Each file under its room, and no file that is gone."""
    design = (PACKAGE.parent / "docs" / "design.md").read_text().partition("```text\n")[2].partition("```")[0]
    listed: dict[str, set[str]] = {"": set()}
    room = ""
    for line in design.splitlines():
        if found := re.match(r"  (\w+)/(?: |$)", line):
            room = found[1]
        elif re.match(r"  \w", line):
            room = ""
        for name in re.findall(r"\b(\w+)\.py\b", line):
            listed.setdefault(room, set()).add(name)
    there: dict[str, set[str]] = {}
    for path in FILES:
        if path.name != "__main__.py":
            place = path.relative_to(PACKAGE)
            there.setdefault("" if len(place.parts) == 1 else place.parts[0], set()).add(path.stem)
    listed[""].discard("__init__")
    assert listed == there


@pytest.mark.parametrize("folder", ["journal", "dashboard"])
def test_the_page_knows_no_torch(folder: str) -> None:
    """What TensorBoard loads for its tab imports neither torch nor Lightning, at the top or late."""
    for path in (PACKAGE / folder).glob("*.py"):
        named = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [str(node.module)]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not named & {"torch", "lightning", "pytorch_lightning", "torchmetrics"}


def test_arrows_test_goes_red(tmp_path: Path) -> None:
    """The reader of imports sees both forms, and passes over what is imported late."""
    file = tmp_path / "x.py"
    file.write_text("import lightning.pytorch as pl\nfrom lightning_bn import modes\ndef f():\n    import tqdm\n")
    assert imports(file) == {"lightning.pytorch", "lightning_bn.modes"}
    assert own(file) == {"modes"}
