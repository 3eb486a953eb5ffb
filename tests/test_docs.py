"""Every block of Python in the README and the docs runs; every line of their text is one sentence."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from others_packages import loaded_alone

ROOT = Path(__file__).parent.parent
# docs/rules/ has wrong programs on purpose, which its own test runs; of recipes.md each section runs by itself.
OTHERS = ("recipes.md",)
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in OTHERS)
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PRELUDE, *RECIPES = (ROOT / "docs" / "recipes.md").read_text().split("\n## ")
NEEDED = {
    "Ray Train": "ray",
    "torchao": "torchao",
    "schedule-free": "schedulefree",
    "ModelEmaV3": "timm",
    "LoRA": "peft",
}
FOLDERS = (ROOT, ROOT / "docs", ROOT / "docs" / "rules", ROOT / ".github")
TEXTS = [path for folder in FOLDERS for path in sorted(folder.glob("*.md"))]
# The end of a sentence and the beginning of the next one: a name that is never capitalised, or whatever is not a lower
# case letter. An initial ("K. He") and "et al." end none.
NEXT = re.compile(
    r"""(?<![A-Z])(?<!\bal)(?<!e\.g)(?<!i\.e)[.!?]["')\]*`_]*\s+(?=[A-Z`*\["(0-9'_]|(?:lightning-bn|torch)\b)"""
)
ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s")
NO_TEXT = re.compile(r"^ {4}|^\s*(?:[|#<>]|!!!|:::|!?\[[^\]]*\](?:: |\([^)]*\)$)|\d+\. \W*$)")


def run_blocks(text: str, name: str, namespace: dict[str, object]) -> None:
    """Run the text's blocks one after the other, in one namespace, as a reader would paste them."""
    for number, block in enumerate(BLOCK.findall(text), 1):
        exec(compile(block, f"{name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's programs run as they stand."""
    monkeypatch.chdir(tmp_path)
    run_blocks(page.read_text(), page.name, {"__name__": "__main__"})


def printed(program: str, folder: Path) -> list[str]:
    """Run a program as a newcomer does, and return the lines it prints, without what depends on the processor."""
    (folder / "first.py").write_text(program)
    done = subprocess.run([sys.executable, "first.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [without_numbers(line) for line in (done.stdout + done.stderr).splitlines()]


def without_numbers(line: str) -> str:
    # Lightning puts the place of the call before a warning.
    return re.sub(r"\d+(\.\d+)?(e-\d+)?", "0", re.sub(r"^/\S+\.py:\d+: ", "", line)).strip()


def test_the_first_program_of_the_readme_prints_what_stands_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an empty folder, each line of the first output; the README's other programs run too."""
    text = (ROOT / "README.md").read_text()
    shown = re.search(r"```text\n(.*?)```", text, re.DOTALL).group(1)
    program, *others = BLOCK.findall(text)
    lines = printed(program, tmp_path)
    assert [line for line in shown.splitlines() if line and without_numbers(line) not in lines] == []
    assert [line for line in lines if "BatchNorm" in line and line not in without_numbers(shown)] == []
    monkeypatch.chdir(tmp_path)
    for other in others:
        exec(compile(other, "README.md", "exec"), {"__name__": "__main__"})


def test_a_healthy_run_prints_what_the_docs_say(tmp_path: Path) -> None:
    """The programs of the first page, in one file, print its lines and no other of this package's."""
    text = (ROOT / "docs" / "getting-started.md").read_text()
    shown = re.search(r"```text\n(.*?)```", text, re.DOTALL).group(1)
    lines = printed("\n".join(BLOCK.findall(text)), tmp_path)
    assert [line for line in shown.splitlines() if line and without_numbers(line) not in lines] == []
    assert not [line for line in lines if re.match(r"BN\d", line)]


def test_every_rule_has_a_symptom() -> None:
    """The page of symptoms leads to each rule, and to no page that is not there."""
    text = (ROOT / "docs" / "symptoms.md").read_text()
    named = {int(code) for code in re.findall(r"rules/bn(\d+)\.md", text)} | {402, 403, 404}  # "BN401 to BN405"
    assert named == {int(page.stem[2:]) for page in (ROOT / "docs" / "rules").glob("bn*.md")}


def import_or_stand_in(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip a test whose package is not installed; of timm the one module that a recipe takes is enough."""
    if package == "timm":
        monkeypatch.setitem(sys.modules, "timm.utils", loaded_alone("timm", "utils/model_ema.py"))
        monkeypatch.setitem(sys.modules, "timm", ModuleType("timm"))
    else:
        pytest.importorskip(package)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.partition("\n")[0])
def test_recipes_run(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each recipe needs the page's first block, and no other recipe; one of a further package runs where that is
    installed."""
    for title, package in NEEDED.items():
        if title in recipe.partition("\n")[0]:
            import_or_stand_in(package, monkeypatch)
    if recipe.startswith("Ray"):
        warnings.simplefilter("default")  # Ray warns of settings of its own
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.quantized, "engine", torch.backends.quantized.engine)
    namespace: dict[str, object] = {"__name__": "__main__"}
    run_blocks(PRELUDE, "recipes.md, first block", namespace)
    assert BLOCK.search(recipe), "a recipe is a program"
    run_blocks(recipe, "recipes.md", namespace)


def text_lines(page: Path) -> list[str]:
    """Return the page's lines; whatever is no running text (code, tables, headings, options) is an empty one."""
    text = re.sub(r"(?ms)^(\s*```).*?^\s*```$", "", page.read_text())
    return ["" if NO_TEXT.match(line) else line for line in text.splitlines()]


def two_sentences(line: str) -> bool:
    """Return whether a sentence begins in the line after another has ended; what stands in backticks is a word."""
    text = re.sub(r"`[^`]*`", "`x`", ITEM.sub("", line))
    return NEXT.search(text) is not None


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_one_sentence_a_line(page: Path) -> None:
    """A change to a sentence is a change to a line: no line has two sentences, and no sentence two lines."""
    lines = text_lines(page)
    assert [line for line in lines if two_sentences(line)] == []
    cut = [
        line
        for line, after in pairwise(lines)
        if line.strip() and after.strip() and not ITEM.match(after) and not re.search(r"""[.!?:]["')\]*`_]*$""", line)
    ]
    assert cut == []


def test_readme_is_short() -> None:
    """Less than 700 words before the links, and the first command within the first screen."""
    text = (ROOT / "README.md").read_text()
    assert len(text.partition("\n## Read on")[0].split()) < 700
    assert text.splitlines().index("pip install lightning-bn") < 24
