"""The command line of ``lightning-bn``: its help, mistakes in it and what they are told, terminals, the extra."""

from __future__ import annotations

import pytest
from commands import call, terminal

import lightning_bn
from lightning_bn.cli import main

RECALIBRATE = ["recalibrate", "--config", "c.yaml", "--ckpt_path", "x.ckpt"]
MISTAKES = {
    "no command": ([], 2, ""),
    "unknown command": (["repair"], 2, "invalid choice: 'repair' (choose from"),
    "no checkpoint": (["recalibrate", "--config", "c.yaml"], 2, "the following arguments are required: --ckpt_path"),
    "missing file": (["inspect", "nowhere.ckpt"], 2, "there is no file nowhere.ckpt"),
    "three files": (["inspect", "a", "b", "c"], 2, "here are 3"),
    "nearly a rule": (["rules", "BN1O4"], 2, "Did you mean BN104?"),
    "unknown rule": (["rules", "BN999"], 2, "there is no rule BN999. The rules are BN100"),
    "needless overrides": (["rules", "--", "--x=1"], 2, "nothing goes after --"),
    "exact with tolerance": ([*RECALIBRATE, "--exact", "--tolerance", "0.1"], 2, "--exact needs all"),
    "a folder": (["inspect", "."], 2, ". is a folder; give a file that is in it"),
    "no file to inspect": (["inspect"], 2, "the following arguments are required: CKPT"),
    "nothing at all": (["recalibrate"], 2, "the following arguments are required: --config, --ckpt_path"),
    "no such option": ([*RECALIBRATE, "--batches", "3"], 2, "unrecognized arguments: --batches 3"),
    "half an option": ([*RECALIBRATE, "--num", "3"], 2, "unrecognized arguments: --num 3"),
    "negative batches": ([*RECALIBRATE, "--num_batches=-1"], 2, "--num_batches: it takes a whole number above 0"),
    "no number": ([*RECALIBRATE, "--num_batches", "all"], 2, "it takes a whole number above 0, not all"),
    "no tolerance": ([*RECALIBRATE, "--tolerance", "0"], 2, "--tolerance: it takes a number above 0"),
    "not a tolerance": ([*RECALIBRATE, "--tolerance", "nan"], 2, "--tolerance: it takes a number above 0"),
    "no number for it": ([*RECALIBRATE, "--tolerance", "low"], 2, "it takes a number above 0, as 0.02, not low"),
    "no such data": ([*RECALIBRATE, "--dataloader", "test"], 2, "--dataloader: invalid choice: 'test' (choose from"),
    "no yes or no": ([*RECALIBRATE, "--weights_only", "0"], 2, "--weights_only: invalid choice: '0' (choose from"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_without_a_traceback(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An invalid command line ends with 2, and its last line says why; without a command there is the help alone."""
    got, out, err = call(*arguments, capsys=capsys)
    assert bool(err) == bool(arguments)
    assert got == code
    assert message in err.splitlines()[-1] if err else out.startswith("usage: lightning-bn")
    assert "Traceback" not in out + err


def test_help_documents_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    """--help ends with 0, and has each option and the exit codes."""
    for command, options in (
        (
            "recalibrate",
            "--config --ckpt_path --output --num_batches --tolerance --exact --dry_run --dataloader --overwrite --json",
        ),
        ("validate", "--compare --config --ckpt_path --json"),
        ("inspect", "CKPT --json"),
        ("rules", "CODE --json"),
    ):
        code, out, _ = call(command, "--help", capsys=capsys)
        assert code == 0
        assert all(option in out for option in options.split())
        assert "Exit codes: 0" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version names the package's version."""
    code, out, _ = call("--version", capsys=capsys)
    assert code == 0
    assert lightning_bn.__version__ in out


def test_levels_are_coloured_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A level has its colour where a person reads it, none in a file or a pipe, and none under NO_COLOR."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    with terminal("stdout") as read:
        main(["rules", "BN104"])
        assert "BN104 (\033[1;31merror\033[0m): running statistics" in read()
        main(["rules"])
        assert "BN100  \033[36minfo\033[0m     layers that the rules" in read()
        monkeypatch.setenv("NO_COLOR", "1")
        main(["rules"])
        assert "\033" not in read()
    monkeypatch.delenv("NO_COLOR")
    assert "\033" not in call("rules", capsys=capsys)[1]
