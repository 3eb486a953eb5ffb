"""The wheel, in an environment in which this package is not installed otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import lightning_bn

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=check
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that ``pip wheel . --no-deps`` makes, by the hatchling that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    done = run(sys.executable, "-m", "pip", "wheel", *options, ROOT, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


def test_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    """Every file of the package is in it, py.typed too, and no test or example, and of the docs only the
    pages of the rules."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {
            name
            for name in archive.namelist()
            if not name.startswith(f"lightning_bn-{lightning_bn.__version__}.dist-info/")
        }
        pages = {name: archive.read(name) for name in inside if name.startswith("lightning_bn/rules/pages/")}
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "lightning_bn").rglob("*")
        if path.suffix in (".py", ".typed", ".js", ".css")
    }
    docs = (ROOT / "docs" / "rules").iterdir()  # the pages that messages send their reader to
    assert pages == {f"lightning_bn/rules/pages/{page.name}": page.read_bytes() for page in docs}
    assert inside == files | set(pages)
    assert wheel.name == f"lightning_bn-{lightning_bn.__version__}-py3-none-any.whl"


def test_wheel_installs_and_its_entry_points_work(wheel: Path, tmp_path: Path) -> None:
    """In a fresh environment the installed package, not the source tree, is imported, and both ways to the command
    work."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    binaries = tmp_path / "env" / "bin"
    (site,) = (tmp_path / "env").rglob("site-packages")
    target = [
        sys.executable,
        "-m",
        "pip",
        f"--python={binaries / 'python'}",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
    ]
    run(*target, wheel, cwd=tmp_path)
    # What it depends on is taken from here: by a path in the environment's own .pth, in which .pth files of that path
    # don't count.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    file, version = run(
        binaries / "python", "-c", "import lightning_bn as p; print(p.__file__, p.__version__)", cwd=tmp_path
    ).stdout.split()
    assert Path(file).is_relative_to(site)
    assert version == lightning_bn.__version__
    for command in ([binaries / "lightning-bn"], [binaries / "python", "-m", "lightning_bn"]):
        done = run(*command, "rules", "BN203", cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("BN203 (error)")
        assert "# BN203" in done.stdout
    # TensorBoard's own way to the tab.
    code = (
        "from importlib.metadata import distribution; "
        "(point,) = (each for each in distribution('lightning-bn').entry_points if each.group == "
        "'tensorboard_plugins'); print(point.load().__name__, point.value)"
    )
    assert run(binaries / "python", "-c", code, cwd=tmp_path).stdout.split() == [
        "Loader",
        "lightning_bn.dashboard.loader:Loader",
    ]
    # Without the extra `cli` there is no jsonargparse; the page is printed all the same, with both programs.
    (site / "jsonargparse.py").write_text("raise ImportError('not installed')")
    done = run(binaries / "lightning-bn", "rules", "BN203", cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("```python") == 2
