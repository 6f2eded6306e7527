"""Slim, distil and replay from the command line: `python -m kdc COMMAND --help`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from kdc.commands import COMMANDS, CONFIG, Command, is_first_process, settle, write_config
from kdc.paths import try_writing


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; options that are not given are left out of its result."""
    parser = argparse.ArgumentParser(prog="python -m kdc", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        _add(commands.add_parser(name, help=command.help, description=command.help), command)
    return parser


def _add(parser: argparse.ArgumentParser, command: Command) -> None:
    for option in command.options:
        default = "" if option.default is None else f" (default: {_shown(option.default)})"
        if option.required:
            default = " (required)"
        text = (option.help + default).replace("%", "%%")
        if option.positional:
            parser.add_argument(option.name, nargs="?", default=argparse.SUPPRESS, help=text)
            continue
        flag = "--" + option.name.replace("_", "-")
        settings: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS, "help": text}
        if option.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        else:
            nargs: dict[str, Any] = {"nargs": "+"} if option.many else {}
            parser.add_argument(flag, type=option.type, **nargs, **settings)
    parser.add_argument("--config", help="a YAML or JSON file that sets any of these options")
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")


def _shown(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def main(argv: list[str] | None = None) -> None:
    """Run a command. Exit code 2 for a mistake in its use, 1 for a run that failed."""
    given = vars(build_parser().parse_args(argv))
    name, config, traceback = (given.pop(key) for key in ("command", "config", "traceback"))
    try:
        values = settle(name, given, config)
        if "output_dir" in values:
            try_writing(values["output_dir"], (CONFIG, *COMMANDS[name].writes))
    except (ValueError, TypeError, OSError) as error:
        _stop(name, error, 2, traceback)
    try:
        COMMANDS[name].run(values)
        if "output_dir" in values and is_first_process():
            write_config(name, values, values["output_dir"])
    except KeyboardInterrupt as stopped:
        print(f"python -m kdc {name}: {str(stopped) or 'stopped'}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:  # whatever the libraries raise: one line, unless asked for more
        _stop(name, error, 1, traceback)


def _stop(name: str, error: Exception, code: int, traceback: bool) -> None:
    if traceback:
        raise error
    said = str(error) or type(error).__name__
    print(f"python -m kdc {name}: {said}", file=sys.stderr)
    raise SystemExit(code) from error


__all__ = ["CONFIG", "build_parser", "main"]

if __name__ == "__main__":
    main()
