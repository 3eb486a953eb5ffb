"""The command line: what it takes, and how it ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lightning_bn.cli.output import FINDINGS, INTERRUPTED, USAGE, RefusedError, UsageError
from lightning_bn.cli.wording import speak_plainly

__all__ = ["main"]

_PATHS = ("checkpoints", "runs", "ckpt_path", "config", "output")
_EXIT_CODES = "Exit codes: 0 all is well; 1 findings, or refused with nothing changed; 2 invalid command line."
_OVERRIDES = (
    "What stands after -- goes to the LightningCLI and overrides the config, as in: -- --trainer.accelerator=cpu "
    "--data.batch_size=64. Classes are imported from the current directory too. "
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lightning-bn`` with the arguments `argv`, by default the process's own; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    own, overrides = _split(arguments)
    try:
        parser = _parser()
        _check_command(own)
        parsed = parser.parse_args(own)
        options = parsed.as_dict() if hasattr(parsed, "as_dict") else _by_command(vars(parsed))
        command = options.pop("subcommand")
        if command is None:
            parser.print_help()
            return USAGE
        values = {name: _as_path(value) if name in _PATHS else value for name, value in options[command].items()}
        return _run(command, values, overrides)
    except SystemExit as stop:  # the parsers' own way out
        return stop.code if isinstance(stop.code, int) else USAGE if stop.code else 0
    except UsageError as error:
        return _complain(error, USAGE)
    except RefusedError as error:
        return _complain(error, FINDINGS)
    except KeyboardInterrupt:
        return _complain("interrupted; no file was changed.", INTERRUPTED)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def _check_command(arguments: list[str]) -> None:
    """Raise where the first argument is a word that is no command, with the command that it may stand for."""
    named = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if named is not None and named not in _COMMANDS:
        near = get_close_matches(named, _COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"there is no command {named}.{hint} The commands are {', '.join(_COMMANDS)}.")


def _by_command(options: dict[str, Any]) -> dict[str, Any]:
    """Return argparse's options in the form of jsonargparse's, by command."""
    command = options.pop("subcommand")
    return {"subcommand": command, command: options}


def _as_path(value: Any) -> Any:
    if isinstance(value, list):
        return [Path(each) for each in value]
    return None if value is None else Path(value)


def _complain(error: object, code: int) -> int:
    print(f"lightning-bn: {error}", file=sys.stderr)
    return code


def _run(command: str, options: dict[str, Any], overrides: list[str]) -> int:
    if command in ("inspect", "rules", "report"):
        if overrides:
            raise UsageError(f"{command} reads no config, so nothing goes after --.")
        if command == "report":
            from lightning_bn.cli.report import report  # which needs no torch

            return report(**options)
        from lightning_bn.cli import inspection

        return int(getattr(inspection, command)(**options))
    if options["num_batches"] < 1:
        raise UsageError(f"--num_batches {options['num_batches']}: it takes a whole number above 0.")
    if options["tolerance"] is not None and not options["tolerance"] > 0:
        raise UsageError(f"--tolerance {options['tolerance']:g}: it takes a number above 0, as 0.02.")
    if options["exact"] and options["tolerance"] is not None:
        raise UsageError(
            "--exact needs all batches at once and can't stop at a --tolerance; give --num_batches with it."
        )
    # These import Lightning, which takes seconds.
    if command == "recalibrate":
        from lightning_bn.cli.recalibration import recalibrate

        return recalibrate(overrides=overrides, **options)
    from lightning_bn.cli.validation import validate

    return validate(overrides=overrides, **options)


def _parser() -> Any:
    description = "Recalibrate, look at and compare batch-norm statistics in checkpoints; show a run on one page."
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        return _parser_without_configs(description)
    parser = ArgumentParser(prog="lightning-bn", version=_version(), description=description, epilog=_EXIT_CODES)
    speak_plainly(parser)
    commands = parser.add_subcommands(required=False, metavar="COMMAND")
    for name, build in _COMMANDS.items():
        command = ArgumentParser(description=build.__doc__, epilog=_EXIT_CODES)
        build(command)
        speak_plainly(command, name)
        commands.add_subcommand(name, command, help=build.__doc__)
    return parser


def _parser_without_configs(description: str) -> argparse.ArgumentParser:
    """Return a parser of what needs no config, and so no jsonargparse; the other commands say how to install it."""
    parser = argparse.ArgumentParser(prog="lightning-bn", description=description, epilog=_EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"lightning-bn {_version()}")
    speak_plainly(parser)
    commands = parser.add_subparsers(dest="subcommand", metavar="COMMAND")
    for name in _WITHOUT_CONFIG:
        build = _COMMANDS[name]
        command = commands.add_parser(name, help=build.__doc__, description=build.__doc__, epilog=_EXIT_CODES)
        build(command)
        speak_plainly(command, name)
    for name in _COMMANDS.keys() - set(_WITHOUT_CONFIG):
        commands.add_parser(name, add_help=False, help="needs pip install 'lightning-bn[cli]'").set_defaults(
            needs_configs=True
        )
    parser.parse_args = _refusing(parser.parse_known_args, commands.choices)  # type: ignore[method-assign]
    return parser


def _refusing(parse: Any, commands: Any) -> Any:
    def parse_args(arguments: list[str]) -> argparse.Namespace:
        options, unknown = parse(arguments)
        if vars(options).pop("needs_configs", False):
            raise RefusedError(f"{options.subcommand} reads a config: pip install 'lightning-bn[cli]'.")
        if unknown:
            commands[options.subcommand].error(f"unrecognized arguments: {' '.join(unknown)}")
        return options  # type: ignore[no-any-return]

    return parse_args


def _version() -> str:
    import lightning_bn

    return lightning_bn.__version__


def _recalibrate(parser: Any) -> None:
    """Estimate the running statistics in a checkpoint anew, with its weights, and write another checkpoint."""
    parser.epilog = _OVERRIDES + _EXIT_CODES
    _add_run(parser)
    _add_recalibration(parser)
    parser.add_argument(
        "--output", type=str | None, help="the new file; default: <ckpt_path>-recalibrated.ckpt next to the old one"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="let the new file replace one that is there, be it the input"
    )
    parser.add_argument("--dry_run", action="store_true", help="report what would change, and write nothing")
    _add_json(parser)


def _validate(parser: Any) -> None:
    """Validate a checkpoint; with --compare under its own, recalibrated and batch statistics: the train/eval gap in one
    table."""
    parser.epilog = _OVERRIDES + _EXIT_CODES
    _add_run(parser)
    parser.add_argument(
        "--compare", action="store_true", help="also validate under recalibrated and under batch statistics"
    )
    _add_recalibration(parser)
    _add_json(parser)


def _inspect(parser: Any) -> None:
    """Say what is in the batch-norm layers of a checkpoint, or how far they moved between two; no model is built."""
    parser.add_argument(
        "checkpoints",
        type=str,
        nargs="+",
        metavar="CKPT",
        help="a state_dict or Lightning checkpoint; a second to compare",
    )
    _add_json(parser)


def _rules(parser: Any) -> None:
    """List the rules about batch norm, or explain one."""
    parser.add_argument("code", type=str, nargs="?", metavar="CODE", help="the rule to explain, as BN104")
    _add_json(parser)


def _report(parser: Any) -> None:
    """Write the page about a run, or about two to compare, as one HTML file."""
    parser.add_argument(
        "runs",
        type=str,
        nargs="+",
        metavar="RUN",
        help="the folder of a run, in which its lightning_bn.jsonl lies, or one with a single run below",
    )
    parser.add_argument("--output", type=str, default="report.html", help="the file to write")


def _add_run(parser: Any) -> None:
    parser.add_argument(
        "--config", type=str, required=True, nargs="+", help="the config of a LightningCLI; later ones override"
    )
    parser.add_argument("--ckpt_path", type=str, required=True, help="the checkpoint")
    parser.add_argument(
        "--model",
        type=str | None,
        help="class of the model, as main.Classifier, where the config has no class_path for it",
    )
    parser.add_argument("--data", type=str | None, help="class of the datamodule, likewise")
    parser.add_argument(
        "--cli", type=str | None, help="your subclass of LightningCLI, if its config has keys of its own"
    )
    parser.add_argument(
        "--weights_only",
        type=bool,
        default=True,
        help="false loads pickled objects too, and may run code from the file",
    )


def _add_recalibration(parser: Any) -> None:
    parser.add_argument("--num_batches", type=int, default=200, help="batches to look at, at most")
    parser.add_argument(
        "--tolerance",
        type=float | None,
        help="stop at this standard error of the means, in standard deviations",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="statistics of the network as it runs at inference; holds all batches in memory",
    )
    parser.add_argument("--dataloader", choices=["train", "val"], default="train", help="which of the data to look at")
    parser.add_argument(
        "--layers",
        nargs="+",
        metavar="PATTERN",
        help="patterns of layer names; default: all whose parameters require grad",
    )


def _add_json(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


_COMMANDS: dict[str, Callable[[Any], None]] = {
    "recalibrate": _recalibrate,
    "validate": _validate,
    "inspect": _inspect,
    "rules": _rules,
    "report": _report,
}
_WITHOUT_CONFIG = ("inspect", "rules", "report")
