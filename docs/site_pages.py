"""What of the site nobody writes: the reference, one page for each public object, and the list of the rules' pages.

MkDocs calls the functions whose names begin with ``on_``. What stands in `REFERENCE` is all there is to edit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

from lightning_bn.rules.page import rule_page

# What a record holds is all that it is for: its page has every public field.
_ALL: list[str] = ["*"]

# In the order of use. After a name: the members that its page shows besides the class.
REFERENCE: dict[str, dict[str, list[str]]] = {
    "Callbacks": {
        "ModeCheck": [],
        "ActivationStatsMonitor": ["table", "episodes", "ailments", "verdict", "picture"],
        "BatchNormRecalibration": [],
        "ConvertBatchNorm": [],
        "FreezeBatchNorm": [],
        "DriftMonitor": [],
        "CompareAverages": ["recommended"],
        "BatchNormSync": ["apply", "revert"],
    },
    "Checks": {
        "check": [],
        "watch": [],
        "check_export": [],
        "exporting": [],
        "Finding": _ALL,
        "Fix": _ALL,
        "ModeCheckError": [],
    },
    "Recalibration": {
        "recalibrate": [],
        "recalibrated": [],
        "RecalibrationReport": _ALL,
        "LayerReport": _ALL,
    },
    "Drift of live data": {
        "drift": [],
        "watch_drift": [],
        "keep_spread": [],
        "DriftReport": _ALL,
        "LayerDeviation": _ALL,
        "DriftWatch": [],
    },
    "Activations": {
        "Episode": ["stage", "value", "limit", "label", "advice"],
        "ActivationStats": ["update", "compute"],
    },
    "Layers": {
        "convert_batch_norm": [],
        "to_torch": [],
        "paused_statistics": [],
        "settle_together": [],
        "BatchNorm1d": [],
        "BatchNorm2d": [],
        "BatchNorm3d": [],
    },
    "Sets of statistics": {
        "StatisticsSets": ["names", "active", "use", "add", "remove", "parameters_of", "state_dict"],
    },
    "Averages": {
        "Exponential": [],
        "Window": [],
        "Cumulative": [],
        "Averaging": ["elementwise", "update", "initial_state"],
        "Batch": _ALL,
    },
    "Checkpoints": {
        "checkpoints.health.inspect_checkpoint": [],
        "checkpoints.health.CheckpointHealth": _ALL,
        "checkpoints.health.LayerHealth": _ALL,
        "checkpoints.health.HealthFinding": _ALL,
        "checkpoints.health.compare_checkpoints": [],
        "checkpoints.health.StateDrift": _ALL,
        "checkpoints.health.LayerDrift": _ALL,
        "checkpoints.health.CheckpointRefusedError": [],
    },
}

# The rules by the first digit of their codes.
RULES = {"Modes": 1, "Statistics": 2, "Configuration": 3, "Exported programs": 4}

_PAGE = """\
---
title: {short}
---
::: lightning_bn.{name}
    options:
      heading_level: 1
      show_root_full_path: true
      {members}
"""


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _first_sentence(obj: griffe.Object | griffe.Alias) -> str:
    paragraph = " ".join(obj.docstring.value.partition("\n\n")[0].split()) if obj.docstring is not None else ""
    return re.split(r"(?<=[a-z`)])[.;:] ", paragraph)[0].rstrip(".").replace("|", "\\|") + "."


def _index() -> str:
    """Return the page that lists all objects."""
    package = griffe.load("lightning_bn", search_paths=["."], resolve_aliases=True)
    lines = [
        "---\ntitle: Reference\n---\n# Reference\n",
        "Everything here is importable from `lightning_bn`, but what is under Checkpoints: from "
        "`lightning_bn.checkpoints.health`.",
        "Arguments after `*` are given by name.",
    ]
    for section, names in REFERENCE.items():
        lines += [f"\n## {section}\n", "| | |", "|---|---|"]
        lines += [f"| [`{_short(name)}`]({_short(name)}.md) | {_first_sentence(package[name])} |" for name in names]
    return "\n".join(lines) + "\n"


def on_config(config: Any, **_: Any) -> Any:
    """Put the pages of the objects and of the rules where mkdocs.yml names their indices."""
    pages: list[Any] = ["reference/index.md"]
    pages += [{section: [f"reference/{_short(name)}.md" for name in names]} for section, names in REFERENCE.items()]
    for entry in config["nav"]:
        if isinstance(entry, dict) and "Reference" in entry:
            entry["Reference"] = pages + [page for page in entry["Reference"] if page not in pages]
        if isinstance(entry, dict) and "Rules" in entry:
            index, *others = entry["Rules"]
            rules = sorted(f"rules/{path.name}" for path in (Path(__file__).parent / "rules").glob("bn*.md"))
            groups = {name: [page for page in rules if f"/bn{digit}" in page] for name, digit in RULES.items()}
            entry["Rules"] = [index, *({name: pages} for name, pages in groups.items()), *others]
    return config


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages to those that lie in this folder."""
    files.append(File.generated(config, "reference/index.md", content=_index()))
    for names in REFERENCE.values():
        for name, members in names.items():
            shown = f"members: [{', '.join(members)}]"
            if members:
                shown += "\n      inherited_members: true"
            if members is _ALL:
                shown = "show_if_no_docstring: true"
            text = _PAGE.format(short=_short(name), name=name, members=shown)
            files.append(File.generated(config, f"reference/{_short(name)}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Show of a rule what its command prints: the page with what its mistakes cost; and which program is wrong."""
    code = re.fullmatch(r"rules/(bn\d+)\.md", page.file.src_uri)
    if code is None:
        return markdown
    markdown = rule_page(code[1].upper(), full=True)
    for title in ("This is reported", "This is not"):
        markdown = markdown.replace("```python\n", f'```python title="{title}"\n', 1)
    return markdown


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Let a long name break after the package's, on a narrow screen, and not within a word."""
    if not page.file.src_uri.startswith("reference/"):
        return html
    return re.sub(r'(<span class="doc doc-object-name[^>]*>lightning_bn\.)', r"\1<wbr>", html)
