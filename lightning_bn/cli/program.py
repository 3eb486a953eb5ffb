"""The command line: what it takes, and how it ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import lightning_bn
from lightning_bn.cli.output import FINDINGS, INTERRUPTED, OK, USAGE, RefusedError, UsageError

_EXIT_CODES = "Exit codes: 0 all is well; 1 findings, or refused with nothing changed; 2 invalid command line."
_OVERRIDES = (
    "What stands after -- goes to the LightningCLI and overrides the config, as in: -- --trainer.accelerator=cpu "
    "--data.batch_size=64. Classes are imported from the current directory too. "
)


_JSON: dict[str, Any] = {"action": "store_true", "help": "print one JSON document"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lightning-bn`` with the arguments `argv`, by default the process's own; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    own, overrides = arguments, []
    if "--" in arguments:
        place = arguments.index("--")
        own, overrides = arguments[:place], arguments[place + 1 :]
    parser = _parser()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name in a file may have letters that a terminal lacks
    try:
        options = parser.parse_args(own, argparse.Namespace(overrides=overrides))
        if options.command is None:
            parser.print_help()
            return USAGE
        return int(options.run(options))
    except SystemExit as stop:  # the parsers' own way out
        return stop.code if isinstance(stop.code, int) else USAGE if stop.code else 0
    except UsageError as error:
        return _complain(error, USAGE)
    except RefusedError as error:
        return _complain(error, FINDINGS)
    except KeyboardInterrupt:
        return _complain("interrupted; no file was changed.", INTERRUPTED)


def _complain(error: object, code: int) -> int:
    print(f"lightning-bn: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-bn",
        description="Recalibrate, look at and compare batch-norm statistics in checkpoints; show a run on one page.",
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lightning-bn {lightning_bn.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int], name: str, text: str, epilog: str = "") -> Callable[..., Any]:
        one = commands.add_parser(name, help=text, description=text, epilog=epilog + _EXIT_CODES, allow_abbrev=False)
        one.set_defaults(run=run)
        return one.add_argument

    text = "Estimate the running statistics in a checkpoint anew, with its weights, and write another checkpoint."
    add = command(_configured, "recalibrate", text, _OVERRIDES)
    _add_run(add)
    _add_recalibration(add)
    add("--output", type=Path, help="the new file; default: <ckpt_path>-recalibrated.ckpt next to the old one")
    add("--overwrite", action="store_true", help="let the new file replace one that is there, be it the input")
    add("--dry_run", action="store_true", help="report what would change, and write nothing")
    add("--json", **_JSON)

    text = (
        "Validate a checkpoint; with --compare under its own, recalibrated and batch statistics: the train/eval gap in "
        "one table."
    )
    add = command(_configured, "validate", text, _OVERRIDES)
    _add_run(add)
    add("--compare", action="store_true", help="also validate under recalibrated and under batch statistics")
    _add_recalibration(add)
    add("--json", **_JSON)

    text = "Say what is in the batch-norm layers of a checkpoint, or how far they moved between two; no model is built."
    add = command(_inspect, "inspect", text)
    files = "a checkpoint, a folder of model files, or an exported program; a second checkpoint to compare"
    add("checkpoints", type=Path, nargs="+", metavar="CKPT", help=files)
    reference = "the checkpoint that an exported program is to be compared with"
    add("--reference", type=Path, metavar="CKPT", help=reference)
    add("--json", **_JSON)

    add = command(_rules, "rules", "List the rules about batch norm, or explain one.")
    add("code", nargs="?", metavar="CODE", help="the rule to explain, as BN104")
    add("--full", action="store_true", help="with what its page says in detail, below its programs")
    add("--json", **_JSON)

    add = command(_report, "report", "Write the page about a run, or about two to compare, as one HTML file.")
    runs = "the folder of a run, in which its lightning_bn.jsonl lies, or one with a single run below"
    add("runs", type=Path, nargs="+", metavar="RUN", help=runs)
    add("--output", type=Path, default=Path("report.html"), help="the file to write")
    return parser


def _inspect(options: argparse.Namespace) -> int:
    from lightning_bn.cli.reading import inspect

    return inspect(_without_overrides(options).checkpoints, reference=options.reference, json=options.json)


def _rules(options: argparse.Namespace) -> int:
    from lightning_bn.cli.reading import rules

    return rules(_without_overrides(options).code, full=options.full, json=options.json)


def _report(options: argparse.Namespace) -> int:
    from lightning_bn.dashboard.report import find_journal, report_html, run_name  # which need no torch

    runs, output = _without_overrides(options).runs, options.output
    if len(runs) > 2:
        raise UsageError(f"report takes one run, or two to compare; here are {len(runs)}.")
    try:
        paths = [find_journal(run) for run in runs]
        names = [run_name(path) for path in paths]
        if len(set(names)) < len(names):
            names = [str(path.parent) for path in paths]
        content = report_html(dict(zip(names, paths, strict=True)))
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise RefusedError(str(error)) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(content, encoding="utf-8")
    print(f"{output} ({len(content) / 1e6:.1f} MB): open it in a browser.")
    return OK


def _without_overrides(options: argparse.Namespace) -> argparse.Namespace:
    if options.overrides:
        raise UsageError(f"{options.command} reads no config, so nothing goes after --.")
    return options


def _configured(options: argparse.Namespace) -> int:
    if options.exact and options.tolerance is not None:
        raise UsageError(
            "--exact needs all batches at once and can't stop at a --tolerance; give --num_batches with it."
        )
    try:
        import jsonargparse  # noqa: F401, what LightningCLI reads a config with
    except ImportError as error:
        raise RefusedError(f"{options.command} reads a config: pip install 'lightning-bn[cli]'.") from error
    from lightning_bn.cli import session  # which imports Lightning, and that takes seconds

    run: Callable[[argparse.Namespace], int] = getattr(session, f"{options.command}_checkpoint")
    return run(options)


def _add_run(add: Callable[..., Any]) -> None:
    add("--config", type=Path, required=True, nargs="+", help="the config of a LightningCLI; later ones override")
    add("--ckpt_path", type=Path, required=True, help="the checkpoint")
    add("--model", help="class of the model, as main.Classifier, where the config has no class_path for it")
    add("--data", help="class of the datamodule, likewise")
    add("--cli", help="your subclass of LightningCLI, if its config has keys of its own")
    add(
        "--weights_only",
        type=str.lower,
        choices=["true", "false"],
        default="true",
        help="false loads pickled objects too, and may run code from the file",
    )


def _add_recalibration(add: Callable[..., Any]) -> None:
    add("--num_batches", type=_batches, default=200, help="batches to look at, at most")
    add("--tolerance", type=_tolerance, help="stop at this standard error of the means, in standard deviations")
    add(
        "--exact",
        action="store_true",
        help="statistics of the network as it runs at inference; holds all batches in memory",
    )
    add("--dataloader", choices=["train", "val"], default="train", help="which of the data to look at")
    add("--set", metavar="NAME", help="the set of statistics to recalibrate; default: the one outside of sets.use(...)")
    add(
        "--layers",
        nargs="+",
        metavar="PATTERN",
        help="patterns of layer names; default: all whose parameters require grad",
    )


def _batches(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it takes a whole number above 0, not {text}")
    return int(text)


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"it takes a number above 0, as 0.02, not {text}")
    return value
