"""The command `enorm-fx`: analyze a model from the terminal, list the known ops, run the demo.

Exit status: 0 done; 1 `--verify` found that an exact plan changes the outputs, or the reader of
the output went away; 2 a wrong argument or a model that cannot be loaded or traced, told in one
line on stderr. torch and rich are imported when a command runs: `--help` does without them.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from enorm_fx._version import __version__
from enorm_fx.errors import ArgumentError, EnormError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from enorm_fx.model_plan import Plan

_ROUNDING = 1e-6  # relative change of float64 outputs above which a rescaling did not keep them


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
    _add_analyze(commands)
    ops = commands.add_parser("ops", help="list every op that has a rule, by family")
    ops.add_argument("--json", action="store_true", help="with all spellings, as JSON")
    ops.set_defaults(run=_ops)
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
        help="an argument for the class or function, a Python literal or else text; "
        "repeatable")  # fmt: skip
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
    add("--why", action="append", default=[], metavar="NAME", dest="weights",
        help="instead of the tables explain what moves or pins this weight, or each weight of this "
        "module; repeatable")  # fmt: skip
    add("--dot", type=Path, metavar="FILE", help="also draw the graph for Graphviz")
    add("--html", type=Path, metavar="FILE", help="also draw the graph as a page for a browser")
    add("--all", action="store_true", help="leave no group, pair or blocked side out")
    add("--all-pairs", action="store_true",
        help="list every producer with every consumer of its group, not only the pairs between "
        "which no other producer or consumer lies")  # fmt: skip
    add("--json", action="store_true", help="print everything as JSON, and nothing else, on stdout")
    add("--traceback", action="store_true", help="show the traceback of an error too")
    parser.set_defaults(run=_analyze)


def _ops(arguments: argparse.Namespace) -> int:
    from enorm_fx.report import coverage

    if arguments.json:
        print(json.dumps(coverage.to_dict(), indent=2))
    else:
        coverage.show(_console())
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from enorm_fx.demo.run import run

    if not 0 <= arguments.seed < 2**32:
        raise ArgumentError(f"--seed must be between 0 and 2**32 - 1, not {arguments.seed}")
    try:
        run(_console(), arguments.output, epochs=arguments.epochs, seed=arguments.seed)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ArgumentError(f"{arguments.output} cannot be written: {error}") from error
    return 0


def _analyze(arguments: argparse.Namespace) -> int:
    from enorm_fx.cli.target import foreign_code, importable, in_mode, load, parse
    from enorm_fx.report.contents import to_dict

    if arguments.json and arguments.weights:
        raise ArgumentError("--why explains in sentences: it does not go with --json")
    target, keywords = parse(arguments.target), _keywords(arguments.arguments)
    # What the model's code prints must not get into the JSON.
    aside = contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext()
    with aside, importable(target):
        model = load(target, keywords)
        with (
            _muted_logs(),
            in_mode(model, arguments.train),
            foreign_code("analyzing the model"),
        ):
            started = time.perf_counter()
            plan = _plan(model, arguments)
            seconds = time.perf_counter() - started
            verified, status = _verified(plan) if arguments.verify else ("", 0)
    _draw(plan, arguments)
    if arguments.json:
        print(json.dumps(to_dict(plan, all_pairs=arguments.all_pairs), indent=2))
        if verified:
            print(f"verified: {verified}", file=sys.stderr)
    else:
        _show(plan, arguments, seconds, verified)
    return status


def _plan(model: nn.Module, arguments: argparse.Namespace) -> Plan:
    from enorm_fx.analysis import analyze

    return analyze(
        model,
        tuple(_example(text, model) for text in arguments.inputs) or None,
        batchnorm=arguments.batchnorm,
        biases=arguments.biases,
        frozen=arguments.frozen,
        tracer=arguments.tracer,
    )


def _verified(plan: Plan) -> tuple[str, int]:
    """What verification found, and the exit status that it asks for."""
    from enorm_fx.verifying import verify

    found = verify(plan)
    text = (
        f"largest relative change of the outputs {found.largest_change:.1e}, "
        f"{found.trials} random rescalings in float64"
    )
    if found.exact and not found.largest_change <= _ROUNDING:
        return f"NOT KEPT, although the plan is exact: {text}", 1
    return text, 0


def _title(plan: Plan, arguments: argparse.Namespace) -> str:
    return f"{type(plan.model).__name__} from {arguments.target}"


def _draw(plan: Plan, arguments: argparse.Namespace) -> None:
    """Write the files of --dot and --html."""
    from enorm_fx.report.drawing import dot
    from enorm_fx.report.page import page

    for path, draw in ((arguments.dot, dot), (arguments.html, page)):
        if path is not None:
            try:
                path.write_text(draw(plan, _title(plan, arguments)), encoding="utf-8")
            except OSError as error:
                raise ArgumentError(f"{path} cannot be written: {error.strerror}") from error


def _explain(plan: Plan, arguments: argparse.Namespace, verified: str) -> None:
    from enorm_fx.report.why import why

    console = _console()
    told = [why(plan, name, width=console.width) for name in arguments.weights]
    console.print(_title(plan, arguments), style="bold")
    for text in told:
        console.print(f"\n{text}", soft_wrap=True)
    if verified:
        console.print(f"\nverified: {verified}")


def _show(plan: Plan, arguments: argparse.Namespace, seconds: float, verified: str) -> None:
    from enorm_fx.report.contents import to_dict
    from enorm_fx.report.tables import show

    if arguments.weights:
        _explain(plan, arguments, verified)
        return
    mode = "training" if arguments.train else "evaluation"
    notes = [("traced", f"in {mode} mode by the {plan.tracer} front end, {seconds:.1f} s")]
    if verified:
        notes.append(("verified", verified))
    notes += [("drawn in", str(path)) for path in (arguments.dot, arguments.html) if path]
    title = _title(plan, arguments)
    data = to_dict(plan, all_pairs=arguments.all_pairs)
    everything = arguments.all or arguments.all_pairs
    show(_console(), data, title=title, notes=notes, everything=everything)


def _console() -> Console:
    from rich.console import Console

    return Console(markup=False, highlight=False)  # names may contain brackets


def _keywords(arguments: Sequence[str]) -> dict[str, Any]:
    """The values of --arg NAME=VALUE: Python literals, anything else as text."""
    result: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise ArgumentError(f"--arg must be NAME=VALUE, not '{argument}'")
        try:
            result[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            result[name] = value
    return result


def _example(text: str, model: nn.Module) -> Tensor:
    """The tensor of --input SHAPE[:DTYPE]; the type is by default that of the model's weights."""
    import torch

    sizes, colon, name = text.partition(":")
    weights = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = getattr(torch, name, None) if colon else next(weights, torch.get_default_dtype())
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"--input {text}: '{name}' is no torch dtype, such as int64")
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = [0]
    if min(shape) < 1 or math.prod(shape) >= 2**63:
        raise ArgumentError(f"--input must be a shape such as 1,3,224,224, not '{text}'")
    try:
        if dtype.is_floating_point or dtype.is_complex:
            return torch.zeros(1, dtype=dtype).expand(shape)  # no memory, only a shape
        # 0 and 1 in turn: valid as classes or tokens wherever there are two of them.
        return (torch.arange(shape[-1]) % 2).to(dtype).expand(shape)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"--input {text}: {error}") from error


def _one_line(error: EnormError) -> str:
    """The message in one line, without torch's C++ frames and in the words of the command line."""
    message = str(error).partition("Exception raised from ")[0]
    return " ".join(message.split()).replace("example_inputs", "--input")


@contextlib.contextmanager
def _muted_logs() -> Iterator[None]:
    """torch logs a traceback for every call that does not fit; the error says it in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _forget_stdout() -> None:
    """Python flushes stdout once more at exit: let that go nowhere."""
    with contextlib.suppress(OSError, ValueError):  # a replaced stdout may have no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
