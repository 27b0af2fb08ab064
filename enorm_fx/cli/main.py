"""The command `enorm-fx`: its commands, and how they end.

Exit status: 0 done; 1 a check failed, or the reader of the output went away; 2 a wrong argument or
a model that cannot be loaded or traced, told in one line on stderr; 130 interrupted. torch and rich
are imported when a command needs them: `--help`, `--version` and `ops` do without torch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from enorm_fx._version import __version__
from enorm_fx.cli import analyze, balance, compare, demo, ops, smooth, verify
from enorm_fx.errors import ArgumentError, EnormError

COMMANDS = (
    analyze.COMMAND,
    balance.COMMAND,
    smooth.COMMAND,
    verify.COMMAND,
    compare.COMMAND,
    ops.COMMAND,
    demo.COMMAND,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: the arguments after the program's name; None takes those of the process.
    """
    arguments = argparse.Namespace(traceback=False)
    try:
        _parser().parse_args(argv, arguments)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except SystemExit as finished:  # argparse after --help and --version, rich on a closed pipe
        return finished.code if isinstance(finished.code, int) else int(bool(finished.code))
    except BrokenPipeError:
        _forget_stdout()
        return 1
    except KeyboardInterrupt:
        return 130
    except EnormError as error:
        if arguments.traceback:
            traceback.print_exception(error)
        print(f"enorm-fx: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return status


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument the way every other error is reported."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="enorm-fx",
        description="Find every rescaling of a PyTorch model's weights that keeps its function.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        described = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.description,
            epilog=command.epilog,
        )
        command.add_arguments(described)
        described.set_defaults(run=command.run)
    return parser


def _one_line(error: EnormError) -> str:
    """The message in one line, without torch's C++ frames and in the words of the command line."""
    message = str(error).partition("Exception raised from ")[0]
    return " ".join(message.split()).replace("example_inputs", "--input")


def _forget_stdout() -> None:
    """Python flushes stdout once more at exit: let that go nowhere."""
    with contextlib.suppress(OSError, ValueError):  # a replaced stdout may have no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
