"""Files as packages write them: what is read, that nothing in them runs, and what is no checkpoint."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import pickle
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_bn.checkpoints.health import compare_checkpoints, inspect_checkpoint
from lightning_bn.checkpoints.reading import CheckpointRefusedError, read_checkpoint


def trained() -> nn.Sequential:
    net = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3), nn.BatchNorm1d(4))
    for _ in range(3):
        net(torch.randn(8, 3, 9) * 2 + 1)
    return net


NET = trained()
STATE: dict[str, Tensor] = dict(NET.state_dict())
EMA = {key: value * 0.5 if value.is_floating_point() else value for key, value in STATE.items()}
BOTH = ["1", "4"]


class Attributes(dict[str, Any]):
    """A dict of another package."""


class Lists(list[Any]):
    """A list of another package."""


FORMS: dict[str, tuple[Any, list[str]]] = {
    "a state_dict": (STATE, BOTH),
    "timm, with a namespace": (
        {"state_dict": STATE, "state_dict_ema": EMA, "args": argparse.Namespace(lr=0.1)},
        [*BOTH, "state_dict_ema.1", "state_dict_ema.4"],
    ),
    "mmengine, with a deque": (
        {
            "state_dict": STATE,
            "ema_state_dict": {f"module.{key}": value for key, value in EMA.items()},
            "hub": collections.deque([1]),
        },
        [*BOTH, "ema_state_dict.module.1", "ema_state_dict.module.4"],
    ),
    "Lightning, with averaged weights and a Path": (
        {"state_dict": STATE, "current_model_state": EMA, "hyper_parameters": {"root": pathlib.PurePosixPath("data")}},
        [*BOTH, "current_model_state.1", "current_model_state.4"],
    ),
    "nnU-Net, with numpy's scalars": (
        {"network_weights": STATE, "best": np.float64(0.3)},
        ["network_weights.1", "network_weights.4"],
    ),
    "YOLO, a module": ({"epoch": 1, "model": NET, "ema": None}, ["model.1", "model.4"]),
    "a module alone": (NET, BOTH),
    "a list of clients": ([STATE, EMA], ["0.1", "0.4", "1.1", "1.4"]),
    "a mapping a layer": ({"net": {"0": {"1": NET[1].state_dict()}}}, ["net.0.1"]),
    "a dict with attributes": (Attributes(model=STATE), ["model.1", "model.4"]),
    "a list of another package": ({"models": Lists([STATE])}, ["models.0.1", "models.0.4"]),
    "the same key in and beside state_dict": (
        {"state_dict": {"net.1.running_mean": STATE["1.running_mean"], "net.1.running_var": STATE["1.running_var"]}}
        | {"net": {"1.running_mean": EMA["1.running_mean"], "1.running_var": EMA["1.running_var"]}},
        ["net.1", "net.1 (2)"],
    ),
}


def written(content: Any, path: Path, form: str) -> Path:
    if form == "pickle":
        path.write_bytes(pickle.dumps({key: value.numpy() for key, value in content.items()}))
    elif form == "safetensors":
        save_file({key: value.contiguous() for key, value in content.items()}, path)
    elif form == "npz":
        with path.open("wb") as file:
            np.savez(file, **{key: value.numpy() for key, value in content.items()})
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch.save")
    return path


@pytest.mark.parametrize("form", ["torch.save", "torch.save before 1.6"])
@pytest.mark.parametrize(("content", "names"), FORMS.values(), ids=FORMS)
def test_every_mapping_with_statistics_is_read(content: Any, names: list[str], form: str, tmp_path: Path) -> None:
    """At any depth, in lists and in objects of other packages, each layer by the keys that lead to it."""
    health = inspect_checkpoint(written(content, tmp_path / "x", form))
    assert [layer.name for layer in health.layers] == names
    for layer in health.layers:
        place = "4" if layer.name.endswith("4") else "1"
        averaged = any(part in layer.name for part in ("ema", "current", "(2)")) or layer.name.startswith("1.")
        state = EMA if averaged else STATE
        assert layer.var_max == pytest.approx(max(state[f"{place}.running_var"].tolist()))
        assert layer.mean_min == pytest.approx(min(state[f"{place}.running_mean"].tolist()))
        assert layer.batches_tracked == (None if "net.1" in layer.name and "0" not in layer.name else 3)
    assert health.sound


@pytest.mark.parametrize("form", ["torch.save", "torch.save before 1.6", "safetensors", "npz", "pickle"])
def test_a_nan_beside_the_state_dict_is_found_in_every_format(form: str, tmp_path: Path) -> None:
    """The layer that has it is named."""
    sick = dict(STATE) | {"4.running_var": STATE["4.running_var"].clone()}
    sick["4.running_var"][2] = float("nan")
    health = inspect_checkpoint(written(sick, tmp_path / "x", form))
    assert [(found.level, found.rule, found.layer) for found in health.findings if found.level != "info"] == [
        ("error", "BN203", "4")
    ]


def test_what_is_named_is_neither_imported_nor_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that would import a module and call functions does neither; loaded without care it does both."""
    (tmp_path / "side_effect.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('imported').touch()\nclass A: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "called"),)

    for form in ("torch.save", "torch.save before 1.6"):
        made = import_module("side_effect").A()
        path = written({"state_dict": STATE, "extra": [Hostile(), made]}, tmp_path / form, form)
        del sys.modules["side_effect"]
        (tmp_path / "imported").unlink()
        health = inspect_checkpoint(path)
        assert len(health.layers) == 2
        (named,) = health.findings
        assert "none of which was imported or called" in named.text
        assert "posix.mkdir" in named.text
        assert "side_effect.A" in named.text
        compare_checkpoints(path, path)
        with pytest.raises(CheckpointRefusedError, match="refused, and nothing in it was run"):
            read_checkpoint(path)
        assert not (tmp_path / "called").exists()
        assert not (tmp_path / "imported").exists()
        assert "side_effect" not in sys.modules
    torch.load(path, weights_only=False)
    assert (tmp_path / "called").exists()
    assert (tmp_path / "imported").exists()


def test_a_memo_index_reserves_no_memory(tmp_path: Path) -> None:
    """A byte of a pickle may name the four-thousand-millionth place of a table, which the unpickler would make."""
    (tmp_path / "x").write_bytes(b"\x80\x02}r\xff\xff\xff\xf0.")
    with pytest.raises(CheckpointRefusedError, match="memo index"):
        inspect_checkpoint(tmp_path / "x")


def test_a_description_without_end_is_not_followed_to_it(tmp_path: Path) -> None:
    """Forty lists, each twice in the next, are a million millions; one that holds itself has no end."""
    doubled: list[Any] = [STATE]
    for _ in range(40):
        doubled = [doubled, doubled]
    endless: list[Any] = [STATE]
    endless.append(endless)
    for content in (doubled, endless):
        health = inspect_checkpoint(written(content, tmp_path / "x", "torch.save"))
        assert not health.sound
        assert "holds more than is looked at" in health.findings[0].text


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "two counters": ({"num_batches_tracked": torch.tensor([1, 2])}, "its num_batches_tracked has 2 values"),
    "an averaged counter": ({"num_batches_tracked": torch.tensor(float("nan"))}, "its num_batches_tracked is nan"),
    "half a batch": ({"num_batches_tracked": torch.tensor(0.5)}, "its num_batches_tracked is 0.5"),
    "less than none": ({"num_batches_tracked": torch.tensor(-1)}, "its num_batches_tracked is -1"),
    "weight on meta": ({"weight": torch.ones(4, device="meta")}, "its weight is of a kind"),
    "sparse": ({"weight": torch.ones(4).to_sparse()}, "its weight is of a kind"),
    "no text": ({"averaging.state_of": torch.tensor([255, 254], dtype=torch.uint8)}, "state_of is no text"),
    "another size": ({"weight": torch.ones(7)}, r"its weight is \(7,\) where there are 4 channels"),
    "complex": ({"running_mean": torch.randn(4) * 1j}, "its running_mean is of a kind that holds no real numbers"),
    "a number": ({"running_mean": 0.5}, "its running_mean is no tensor but float"),
    "half of it": ({"running_mean": None}, "its running_mean is missing"),
    "the counter alone": ({"running_mean": None, "running_var": None}, "its running_mean is missing"),
    "one value, said often": ({"running_var": torch.ones(1).expand(1 << 40)}, "its running_var has the shape"),
    "sets": ({"running_mean": torch.ones(2, 4)}, r"its running_mean has the shape \(2, 4\)"),
}


@pytest.mark.parametrize(("odd", "text"), ODD.values(), ids=ODD)
def test_what_cannot_be_judged_is_not_sound(odd: dict[str, Any], text: str, tmp_path: Path) -> None:
    """Each entry that is not what a batch norm has is told by layer; the rest of the file is judged."""
    layer = {"running_mean": torch.randn(4), "running_var": torch.ones(4) * 2, "num_batches_tracked": torch.tensor(3)}
    content = {f"a.{key}": value for key, value in (layer | odd).items()} | STATE
    for path in (
        written(content, tmp_path / "x", "torch.save"),
        written({"model": content, "root": pathlib.PurePosixPath("data")}, tmp_path / "y", "torch.save"),
    ):
        health = inspect_checkpoint(path)
        (found,) = [each for each in health.findings if each.level != "info"]
        assert (found.level, found.layer) == ("warning", "model.a" if path.name == "y" else "a")
        # What torch.load does not build is told as what it would be.
        assert re.search(text if path.name == "x" else f"{text}|is no tensor but torch._utils", found.text), found.text
        assert len([layer for layer in health.layers if not layer.name.endswith("a")]) == 2


def test_a_layer_that_keeps_no_statistics_is_none(tmp_path: Path) -> None:
    """A pickled module with track_running_stats=False has the keys, and nothing under them."""
    net = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), *trained())
    health = inspect_checkpoint(written(net, tmp_path / "x", "torch.save"))
    assert [layer.name for layer in health.layers] == ["2", "5"]
    assert health.sound


def test_plain_words_for_what_is_no_checkpoint(tmp_path: Path) -> None:
    """Each says what the file is, and where it can what to do."""
    np.savez(tmp_path / "round.npz", *[value.numpy() for value in STATE.values()])
    np.save(tmp_path / "one.npy", np.ones(3))
    for name, content, words in (
        ("notes.txt", "epoch,loss\n1,0.5\n", "it is a text file"),
        ("accents.txt", "é" * 3000, "it is a text file"),
        ("pointer.pth", "version https://git-lfs.example/spec/v1\noid sha256:a\n", "a pointer of Git LFS"),
        ("page.pt", "<html>404</html>", "it is a page of HTML"),
        ("empty.ckpt", "", "it is empty"),
        ("round.npz", None, "arrays without names"),
        ("one.npy", None, "one numpy array without a name"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(CheckpointRefusedError, match=words):
            inspect_checkpoint(tmp_path / name)


def test_a_file_that_was_cut_short_says_so(tmp_path: Path) -> None:
    """At any length, in one line."""
    whole = written(STATE, tmp_path / "x", "torch.save").read_bytes()
    for share in (0.2, 0.5, 0.8, 0.95):
        (tmp_path / "cut").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CheckpointRefusedError, match=r"is damaged or cut short: .*\.$"):
            inspect_checkpoint(tmp_path / "cut")


def test_a_folder_of_model_files_is_read(tmp_path: Path) -> None:
    """One file of safetensors or several; a folder of anything else says what to give."""
    first = {key: value for key, value in STATE.items() if key.startswith(("0", "1"))}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="is a folder; give a file that is in it"):
        inspect_checkpoint(tmp_path / "nothing")
    save_file({key: STATE[key] for key in STATE if key not in first}, tmp_path / "model-00002-of-00002.safetensors")
    assert [layer.name for layer in inspect_checkpoint(tmp_path).layers] == BOTH


def test_names_from_a_file_hold_no_control_characters(tmp_path: Path) -> None:
    """What a key of a file tells a terminal to do, it is not told."""
    content = {f"\x1b[2Jlayer\n.{key}": value for key, value in nn.BatchNorm1d(2).state_dict().items()}
    health = inspect_checkpoint(written(content, tmp_path / "x", "torch.save"))
    assert [layer.name for layer in health.layers] == [r"\x1b[2Jlayer\n"]
    path = written({"layer\u00e9.running_mean": torch.ones(2)}, tmp_path / "y", "torch.save")
    done = subprocess.run(
        [sys.executable, "-m", "lightning_bn", "inspect", str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert r"layer\xe9" in done.stdout


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells its peak of memory by Linux's /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Of a checkpoint of 200 MB the norms alone are read: the peak is at most 1.2 times that of importing torch."""
    content = {**STATE, **{f"w{place}": torch.zeros(12_500_000) for place in range(4)}}
    paths = [
        written(content, tmp_path / "a", "torch.save"),
        written({"model": content, "root": pathlib.PurePosixPath("data")}, tmp_path / "b", "torch.save"),
        written(content, tmp_path / "c", "torch.save before 1.6"),
        written(content, tmp_path / "d", "safetensors"),
    ]
    least = _peak("import torch")
    for path in paths:
        assert _peak(f"from lightning_bn.cli import main; assert main(['inspect', {str(path)!r}]) == 0") <= 1.2 * least


def _peak(program: str) -> int:
    """Peak memory of a program in a process of its own, in kilobytes; getrusage counts what started it too."""
    measured = f"{program}\nimport sys\nprint(open('/proc/self/status').read(), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", measured], capture_output=True, text=True, check=True)
    return int(done.stderr.partition("VmHWM:")[2].split()[0])
