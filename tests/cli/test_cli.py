"""The command ``lightning-bn`` on a run of a LightningCLI: what it writes and prints."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from cli_models import Averaged, Data, InSets
from commands import call, terminal
from lightning.pytorch.cli import LightningCLI
from small_models import Small
from states import matches_weights
from torch import Tensor, nn

from lightning_bn import Window, convert_batch_norm, recalibrate
from lightning_bn.cli import main
from lightning_bn.rules import RULES
from lightning_bn.rules.exported import EXPORT_RULES

CONFIG: dict[str, Any] = {
    "seed_everything": 1,
    "model": {
        "class_path": "cli_models.Averaged",
        "init_args": {"averaging": {"class_path": "lightning_bn.Window", "init_args": {"size": 3}}},
    },
    "data": {"class_path": "cli_models.Data"},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {
                "class_path": "lightning_bn.ConvertBatchNorm",
                "init_args": {"averaging": {"class_path": "lightning_bn.Window", "init_args": {"size": 4}}},
            },
            {"class_path": "lightning_bn.ModeCheck", "init_args": {"action": "raise", "ignore": ["BN302", "BN305"]}},
            {
                "class_path": "lightning_bn.ActivationStatsMonitor",
                "init_args": {"every_n_steps": 2, "heatmaps": False, "layers": "rest.*"},
            },
            {
                "class_path": "lightning_bn.BatchNormRecalibration",
                "init_args": {"when": "validation", "num_batches": 2},
            },
            {
                "class_path": "lightning_bn.CompareAverages",
                "init_args": {
                    "averages": {"w5": {"class_path": "lightning_bn.Window", "init_args": {"size": 5}}},
                    "recalibrated": False,
                },
            },
            {"class_path": "ModelCheckpoint", "init_args": {"filename": "run"}},
        ],
    },
}


pytestmark = [
    # What LightningCLI itself calls in jsonargparse; and its words on being called from Python.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@dataclass
class Run:
    config: Path  # as the LightningCLI has saved it
    ckpt: Path

    @property
    def options(self) -> list[str]:
        return ["--config", str(self.config), "--ckpt_path", str(self.ckpt)]

    def load(self, path: Path | None = None) -> dict[str, Any]:
        return torch.load(path or self.ckpt, weights_only=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A fit from a config in which this package's callbacks and averages stand, by a plain LightningCLI."""
    folder = tmp_path_factory.mktemp("run")
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "default_root_dir": str(folder)}}
    (folder / "written.yaml").write_text(yaml.safe_dump(config))
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(folder)}}
    cli = LightningCLI(args=["fit", f"--config={folder / 'written.yaml'}", f"--trainer.logger={json.dumps(logger)}"])
    assert repr(cli.model.bn1.averaging) == "Window(size=4)"
    return Run(next(folder.rglob("config.yaml")), next(folder.rglob("run.ckpt")))


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """A copy of the run's checkpoint that a test may write beside."""
    copy = tmp_path / "best.ckpt"
    copy.write_bytes(finished.ckpt.read_bytes())
    return Run(finished.config, copy)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def test_recalibrate_writes_statistics_that_match_the_weights(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The new file's first layer has the moments of the data, by float64 loops; all else in it, and the old file, is as
    it was."""
    before, content = run.load(), run.ckpt.read_bytes()
    code, out, _ = call("recalibrate", *run.options, capsys=capsys)
    written = run.ckpt.with_name("best-recalibrated.ckpt")
    after = run.load(written)
    assert code == 0
    assert f"Written: {written}" in out
    assert "Recalibrated 2 batch-norm layers from 6 batches" in out
    assert not matches_weights(before["state_dict"])
    assert matches_weights(after["state_dict"])
    assert run.ckpt.read_bytes() == content
    for key in [key for key in before["state_dict"] if key.endswith(("running_mean", "running_var"))]:
        after["state_dict"][key] = before["state_dict"][key]
    assert {"optimizer_states", "callbacks", "loops"} <= set(before)
    assert equal(before, after)
    assert set(run.ckpt.parent.iterdir()) == {run.ckpt, written}


def test_recalibrate_overwrites_only_when_told(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is there, the input above all, is refused with exit code 1 before any pass over data; --overwrite
    replaces it."""
    content = run.ckpt.read_bytes()
    code, out, err = call("recalibrate", *run.options, "--output", str(run.ckpt), capsys=capsys)
    assert (code, out) == (1, "")
    assert "best.ckpt exists" in err
    assert run.ckpt.read_bytes() == content
    assert call("recalibrate", *run.options, "--output", str(run.ckpt), "--overwrite", capsys=capsys)[0] == 0
    assert matches_weights(run.load()["state_dict"])


def test_dry_run_writes_nothing_and_json_has_the_report(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """stdout is one JSON document: the report, and no file; limits, patterns and overrides of the config are heeded."""
    options = ("--dry_run", "--json", "--num_batches", "2", "--layers", "rest.*", "--", "--data.batch_size=4")
    code, out, _ = call("recalibrate", *run.options, *options, capsys=capsys)
    report = json.loads(out)
    assert code == 0
    assert (report["batches"], report["samples"], report["dry_run"], report["output"]) == (2, 8, True, None)
    assert [layer["name"] for layer in report["layers"]] == ["rest.3"]
    assert list(run.ckpt.parent.iterdir()) == [run.ckpt]


def test_exact_on_the_validation_data(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """--exact --dataloader val gives what the library does with the same batches and weights."""
    assert call("recalibrate", *run.options, "--exact", "--dataloader", "val", capsys=capsys)[0] == 0
    module = Averaged(Window(3))
    convert_batch_norm(module, Window(4)).load_state_dict(run.load()["state_dict"])
    recalibrate(module, Data().val_dataloader(), exact=True, progress=False)
    written = run.load(run.ckpt.with_name("best-recalibrated.ckpt"))["state_dict"]
    assert torch.equal(written["rest.3.running_var"], module.rest[3].running_var)


def losses(state: dict[str, Tensor], *, batch_statistics: bool) -> float:
    """The mean validation loss of the weights in `state`, by a plain loop on plain layers."""
    module = Small()
    module.load_state_dict({key: value for key, value in state.items() if ".averaging." not in key})
    module.eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d) and batch_statistics:
            layer.training, layer.track_running_stats = True, False
    with torch.no_grad():
        each = [F.cross_entropy(module(inputs), labels).item() for inputs, labels in Data().val_dataloader()]
    return sum(each) / len(each)


def test_validate_compares_three_statistics(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The three columns are the losses that a plain loop finds with each file's statistics, and with the batches'."""
    code, out, _ = call("validate", *run.options, "--compare", "--json", "--exact", capsys=capsys)
    columns = json.loads(out)
    assert code == 0
    assert list(columns) == ["checkpoint", "recalibrated", "batch statistics"]
    call("recalibrate", *run.options, "--exact", capsys=capsys)
    own, written = run.load()["state_dict"], run.load(run.ckpt.with_name("best-recalibrated.ckpt"))["state_dict"]
    expected = [
        losses(own, batch_statistics=False),
        losses(written, batch_statistics=False),
        losses(own, batch_statistics=True),
    ]
    assert [column["val_loss"] for column in columns.values()] == pytest.approx(expected, rel=1e-4)
    assert len({round(value, 4) for value in expected}) == 3
    _, table, _ = call("validate", *run.options, capsys=capsys)
    assert table.splitlines()[0].split() == ["metric", "checkpoint"]
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["val_loss", "val_acc"]


def test_inspect_prints_the_layers_and_the_drift(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """One file gives its layers, two give the drift between them; findings give exit code 1."""
    code, out, _ = call("inspect", str(run.ckpt), "--json", capsys=capsys)
    assert code == 0
    assert [(layer["name"], layer["channels"]) for layer in json.loads(out)["layers"]] == [
        ("bn1", 5),
        ("rest.3", 3),
        ("callbacks.CompareAverages.followers.w5.bn1", 5),
        ("callbacks.CompareAverages.followers.w5.rest.3", 3),
    ]
    poisoned = run.load()
    poisoned["state_dict"]["rest.3.running_mean"][1] = float("nan")
    torch.save(poisoned, run.ckpt.with_name("poisoned.ckpt"))
    code, out, _ = call("inspect", str(run.ckpt.with_name("poisoned.ckpt")), capsys=capsys)
    assert code == 1
    assert out.splitlines()[0].startswith("error: BN203 rest.3: 1 entries")
    assert [line.split()[0] for line in out.splitlines()[-5:-2]] == ["layer", "rest.3", "bn1"]
    code, out, _ = call("inspect", str(run.ckpt), str(run.ckpt.with_name("poisoned.ckpt")), capsys=capsys)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[-4:-2]] == ["rest.3", "bn1"]


def test_rules_are_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Every rule has a line; one rule has its why and its fix, whatever the case of its code."""
    code, out, _ = call("rules", capsys=capsys)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:-2]] == [*RULES, *EXPORT_RULES]
    code, out, _ = call("rules", "bn104", capsys=capsys)
    assert code == 0
    assert RULES["BN104"].why in out
    assert [rule["code"] for rule in json.loads(call("rules", "--json", capsys=capsys)[1])] == [*RULES, *EXPORT_RULES]


def test_refusals_say_what_is_wrong(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config, model, class or layer that does not go with the checkpoint is refused; nothing is written."""
    plain, other = tmp_path / "plain.pt", tmp_path / "other.ckpt"
    torch.save({"weight": torch.ones(1)}, plain)
    torch.save({"state_dict": {"weight": torch.ones(1)}}, other)
    config = str(run.config)
    for arguments, code, message in (
        (["--config", config, "--ckpt_path", str(plain)], 1, "is not a Lightning checkpoint"),
        (["--config", config, "--ckpt_path", str(other)], 1, "the checkpoint is not of the config's model"),
        ([*run.options, "--model", "cli_models.Nothing"], 2, "--model cli_models.Nothing"),
        ([*run.options, "--layers", "nothing.*"], 1, "it means none of the 2 batch-norm layers"),
        ([*run.options, "--output", str(tmp_path / "nowhere" / "x.ckpt")], 2, "there is no directory"),
        (["--config", str(tmp_path / "no.yaml"), "--ckpt_path", str(run.ckpt)], 2, "--config"),
        (["--config", config, "--ckpt_path", __file__], 1, "is no checkpoint: it is a text file"),
    ):
        got, out, err = call("recalibrate", *arguments, capsys=capsys)
        assert (got, out) == (code, "")
        assert message in err
    assert set(tmp_path.iterdir()) == {run.ckpt, plain, other}


def test_what_needs_no_config_needs_no_extra(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without jsonargparse, rules and inspect work, and the others say what to install."""
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert call("rules", "BN104", capsys=capsys)[0] == 0
    code, out, _ = call("inspect", str(run.ckpt), "--json", capsys=capsys)
    assert (code, len(json.loads(out)["layers"])) == (0, 4)
    code, _, err = call("recalibrate", *run.options, capsys=capsys)
    assert (code, "pip install 'lightning-bn[cli]'" in err) == (1, True)


def test_a_wrong_class_is_told_before_a_file_that_exists(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong with the command comes first, and then what is in its way."""
    output = ["--output", str(run.ckpt)]
    code, _, err = call("recalibrate", *run.options, *output, "--model", "cli_models.Nothing", capsys=capsys)
    assert (code, "cli_models.Nothing" in err) == (2, True)


def test_a_bar_is_for_a_terminal_and_its_total_is_the_loaders(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Six batches of the training data, three of the validation data, as many as --num_batches says; a pipe gets no
    bar."""
    for options, total in (([], 6), (["--dataloader", "val"], 3), (["--num_batches", "2"], 2)):
        with terminal("stderr") as read:
            assert main(["recalibrate", *run.options, "--dry_run", *options]) == 0
            assert f"0/{total} [" in read()
    assert call("recalibrate", *run.options, "--dry_run", capsys=capsys)[2] == ""


def test_own_cli_whose_config_has_keys_of_its_own(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--cli takes a subclass with its arguments and links."""
    config = yaml.safe_load(run.config.read_text())
    del config["data"]["init_args"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**config, "batch": 12}))
    arguments = (
        "--config",
        str(tmp_path / "own.yaml"),
        "--ckpt_path",
        str(run.ckpt),
        "--cli",
        "cli_models.OwnCLI",
        "--dry_run",
        "--json",
    )
    code, out, _ = call("recalibrate", *arguments, capsys=capsys)
    assert code == 0
    assert json.loads(out)["batches"] == 4
    assert call("recalibrate", *(part for part in arguments if "cli" not in part), capsys=capsys)[0] == 2


def test_statistics_without_a_place_in_the_checkpoint_are_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that renames keys as it loads leaves no key to write to: nothing is written, rather than half of it."""
    old = run.load()
    old["state_dict"] = {key.replace("bn1", "old"): value for key, value in old["state_dict"].items()}
    torch.save(old, run.ckpt)
    config = json.dumps({**CONFIG["model"], "class_path": "cli_models.Renaming"})
    code, _, err = call("recalibrate", *run.options, "--", f"--model={config}", capsys=capsys)
    assert code == 1
    assert "its bn1.running_mean is not in the checkpoint" in err
    assert list(run.ckpt.parent.iterdir()) == [run.ckpt]


def test_one_set_of_several_is_recalibrated(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """--set writes that set, with the checkpoint's weights, and no other; without it the first is written, also where
    the file has it among the sets. A name that is no set's is refused."""
    checkpoint = run.load()
    module = convert_batch_norm(InSets(Window(4)), Window(4))
    checkpoint["state_dict"] = module.state_dict()
    torch.save(checkpoint, run.ckpt)
    config = json.dumps({**CONFIG["model"], "class_path": "cli_models.InSets"})
    for option, written in ((["--set", "night"], "night"), ([], "day")):
        code, out, err = call(
            "recalibrate", *run.options, *option, "--overwrite", "--", f"--model={config}", capsys=capsys
        )
        assert code == 0, err
        assert ("bn1@night" in out) == (written == "night")
        module.load_state_dict(run.load(run.ckpt.with_name("best-recalibrated.ckpt"))["state_dict"])
        for name in ("day", "night"):
            assert matches_weights(module.sets.state_dict(name)) == (name == written)
    code, _, err = call(
        "recalibrate", *run.options, "--set", "dusk", "--overwrite", "--", f"--model={config}", capsys=capsys
    )
    assert code == 1
    assert "lightning-bn --set dusk: InSets has no StatisticsSets with all of ['dusk']; it has ['day', 'night']" in err


def test_batch_of_one_is_normalised_as_ever_in_eval(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no statistics of its own: the comparison goes on, as that of `CompareAverages` does."""
    code, out, _ = call("validate", *run.options, "--compare", "--", "--data=cli_models.LastOfOne", capsys=capsys)
    assert code == 0
    assert "batch statistics" in out


def test_callbacks_document_their_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """LightningCLI's own --help has every argument of each callback, with its text from the docstring."""
    for name, argument in (
        ("BatchNormRecalibration", "every_n_epochs"),
        ("ModeCheck", "allow_eval"),
        ("ActivationStatsMonitor", "channel_dim"),
        ("ConvertBatchNorm", "averaging"),
    ):
        with pytest.raises(SystemExit):
            LightningCLI(args=["fit", f"--trainer.callbacks.help=lightning_bn.{name}"])
        out = capsys.readouterr().out
        line = next(line for line in out.splitlines() if f".{argument} " in line)
        assert line
        assert "ERROR" not in out


def test_inspect_tells_the_average_and_does_not_judge_what_it_cannot_read(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each layer's average and dead weights are shown; half of a layer's statistics make the file unsound."""
    state = run.load()
    state["state_dict"]["bn1.weight"][2] = 0.0
    torch.save(state, run.ckpt)
    layers = {
        layer["name"]: layer
        for layer in json.loads(call("inspect", str(run.ckpt), "--json", capsys=capsys)[1])["layers"]
    }
    assert (layers["bn1"]["averaging"], layers["bn1"]["dead_weights"]) == ("Window(size=4)", 1)
    del state["state_dict"]["rest.3.running_var"]
    torch.save(state, run.ckpt)
    code, out, _ = call("inspect", str(run.ckpt), capsys=capsys)
    assert code == 1
    assert "warning: rest.3: its running_var is missing: not judged." in out


def test_as_a_process() -> None:
    """python -m lightning_bn passes its exit code on, shows no traceback, and imports lightning only where it is
    needed."""
    command = [sys.executable, "-X", "importtime", "-m", "lightning_bn", "rules", "BN999"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 2
    assert "there is no rule BN999" in done.stderr
    assert "Traceback" not in done.stderr
    assert "torch" in imported
    assert "lightning" not in imported
