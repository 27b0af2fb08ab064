"""`enorm-fx demo`: train a small network with and without ENorm."""

from __future__ import annotations

import argparse
from pathlib import Path

from enorm_fx.cli.command import Command
from enorm_fx.cli.output import terminal
from enorm_fx.errors import ArgumentError, cannot_write


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--epochs", type=int, default=10, help="of each training (default: 10)")
    add("--seed", type=int, default=0, help="same seed, same figures (default: 0)")
    add("--output", type=Path, default=Path("enorm_demo.png"), metavar="FILE.png",
        help="where the picture goes (default: enorm_demo.png)")  # fmt: skip


def _run(arguments: argparse.Namespace) -> int:
    from enorm_fx.demo.run import run

    if not 0 <= arguments.seed < 2**32:
        raise ArgumentError(f"--seed must be between 0 and 2**32 - 1, not {arguments.seed}")
    try:
        run(terminal(), arguments.output, epochs=arguments.epochs, seed=arguments.seed)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ArgumentError(cannot_write(arguments.output, error)) from error
    return 0


COMMAND = Command(
    "demo",
    "train a small network with and without ENorm and draw what happens",
    _add_arguments,
    _run,
    description="Train a small network on handwritten digits four times: from badly scaled weights "
    "and from ordinary ones, without and with ENorm. Draw what happens. It takes about half a "
    "minute.",
)
