"""The command `enorm-fx`: analyze a model from the terminal, or run the demo.

Exit status: 0 done; 1 `--verify` found that an exact plan changes the outputs, or the reader of
the output went away; 2 a wrong argument or a model that cannot be loaded or traced, told in one
line on stderr. torch and rich are imported when a command runs: `--help` does without them.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from enorm_fx._version import __version__
from enorm_fx.errors import ArgumentError, EnormError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from enorm_fx.plan import Plan

_ROUNDING = 1e-6  # relative change of float64 outputs above which a rescaling did not keep them


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: the arguments after the program's name; None takes those of the process.
    """
    try:
        arguments = _parser().parse_args(argv)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except SystemExit as finished:  # argparse after --help and --version, rich on a closed pipe
        return finished.code if isinstance(finished.code, int) else 0
    except BrokenPipeError:
        _forget_stdout()
        return 1
    except KeyboardInterrupt:
        return 130
    except EnormError as error:
        print(f"enorm-fx: error: {_one_line(str(error))}", file=sys.stderr)
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
    parser.add_argument("--version", action="version", version=f"enorm-fx {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_analyze(commands)
    demo = commands.add_parser(
        "demo", help="train a small network with and without ENorm and draw what happens"
    )
    demo.add_argument("--epochs", type=int, default=30, help="of each training (default: 30)")
    demo.add_argument("--seed", type=int, default=0, help="same seed, same figures (default: 0)")
    demo.add_argument(
        "--output", type=Path, default=Path("enorm_demo.png"), metavar="FILE.png",
        help="where the picture goes (default: enorm_demo.png)",
    )  # fmt: skip
    demo.set_defaults(run=_demo)
    return parser


def _add_analyze(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "analyze",
        help="print the rescalable pairs and groups of a model",
        description="Print the rescalable pairs and groups of a model, which sides of its weights "
        "are blocked and why. The model is built on the CPU; its code is run.",
        epilog="examples: enorm-fx analyze torchvision.models:resnet18; "
        "enorm-fx analyze my/net.py:Net --arg width=64 --input 2,3,32,32 --verify",
    )
    add = parser.add_argument
    add("target", metavar="TARGET", help="package.module:name or path/to/file.py:name; the name "
        "is a class, a function that returns a module, or a module")  # fmt: skip
    add("--arg", action="append", default=[], metavar="NAME=VALUE", dest="arguments",
        help="an argument for the class or function, a Python literal or else text; repeatable")  # fmt: skip
    add("--input", action="append", default=[], metavar="SHAPE[:DTYPE]", dest="inputs",
        help="an example input, such as 1,3,224,224 or 2,16:int64; repeatable (default: a shape "
        "that the first layers admit)")  # fmt: skip
    add("--batchnorm", default="skip", metavar="skip|affine",
        help="look through BatchNorm, which is not exact, or rescale its gamma and beta, which is "
        "(default: skip)")  # fmt: skip
    add("--biases", default="rescale", metavar="rescale|skip|balance",
        help="they follow their layer, stay (not exact), or count in the norm too "
        "(default: rescale)")  # fmt: skip
    add("--frozen", default="pin", metavar="pin|rescale",
        help="what happens to parameters that need no gradient (default: pin)")  # fmt: skip
    add("--tracer", default="auto", metavar="auto|symbolic|export", help="(default: auto)")
    add("--train", action="store_true", help="training mode (default: evaluation mode)")
    add("--verify", action="store_true",
        help="also rescale a float64 copy at random and print the largest relative change of its "
        "outputs (with --json on stderr); status 1 if an exact plan changes them")  # fmt: skip
    add("--all", action="store_true", help="leave no group, pair or blocked side out")
    add("--json", action="store_true", help="print everything as JSON, and nothing else, on stdout")
    add("--traceback", action="store_true", help="when the model's own code fails, show where")
    parser.set_defaults(run=_analyze)


def _demo(arguments: argparse.Namespace) -> int:
    from enorm_fx.demo import run

    run(_console(), arguments.output, epochs=arguments.epochs, seed=arguments.seed)
    return 0


def _analyze(arguments: argparse.Namespace) -> int:
    from enorm_fx._target import load
    from enorm_fx.report import show, to_dict

    # What the model's code prints must not get into the JSON.
    quiet = contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext()
    with quiet, load(arguments.target, _keywords(arguments.arguments), arguments.traceback) as found:
        with _in_mode(found.model, arguments.train), found.running("tracing it"):
            plan, seconds = _timed_plan(found.model, arguments)
            changed, kept = _verified(plan) if arguments.verify else ("", True)
    if arguments.json:
        print(json.dumps(to_dict(plan), indent=2))
        if changed:
            print(changed, file=sys.stderr)
        return 0 if kept else 1
    mode = "training" if arguments.train else "evaluation"
    notes = [("traced", f"{plan.tracer} front end, {seconds:.1f} s")]
    notes += [("verified", changed)] if changed else []
    title = f"{type(plan.model).__name__} from {arguments.target}, in {mode} mode"
    show(_console(), to_dict(plan), title=title, notes=notes, everything=arguments.all)
    return 0 if kept else 1
