"""`enorm-fx analyze`: print what a plan says of a model, and write it into files."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from enorm_fx.cli.command import Command
from enorm_fx.cli.output import HTML, check_ending, stdout_kept_for_json, terminal, write_text
from enorm_fx.cli.target import add_target_arguments, opened
from enorm_fx.errors import ArgumentError

if TYPE_CHECKING:
    from enorm_fx.model_plan import Plan

_ROUNDING = 1e-6  # relative change of float64 outputs above which a rescaling did not keep them


@dataclass(frozen=True, slots=True)
class ReportFile:
    """A report that an option writes into a file.

    option: "--" is left out, as in "html". endings: of the file's name.
    module, function: in `enorm_fx.report`; called with the plan and a title, it returns the text.
    """

    option: str
    module: str
    function: str
    endings: tuple[str, ...]
    help: str

    def text(self, plan: Plan, title: str) -> str:
        """What the file is to hold. The module is imported only now: it needs torch."""
        module = import_module(f"enorm_fx.report.{self.module}")
        made: Callable[[Plan, str], str] = getattr(module, self.function)
        return made(plan, title)


REPORT_FILES = (
    ReportFile("dot", "dot", "dot", (".dot", ".gv"), "also draw the graph for Graphviz"),
    ReportFile("html", "page", "html", HTML, "also draw the graph as a page for a browser"),
)


@dataclass(frozen=True, slots=True)
class _Finding:
    """A plan, how long it took to find (in seconds), and what verification said of it."""

    plan: Plan
    title: str
    seconds: float
    verified: str


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target_arguments(parser)
    add = parser.add_argument
    add("--batchnorm", default="skip", metavar="skip|affine",
        help="look through BatchNorm, which is not exact, or rescale its gamma and beta, which is "
        "(default: skip)")  # fmt: skip
    add("--biases", default="rescale", metavar="rescale|skip|balance",
        help="they follow their layer, stay (not exact), or count in the norm too "
        "(default: rescale)")  # fmt: skip
    add("--frozen", default="pin", metavar="pin|rescale",
        help="what happens to parameters that need no gradient (default: pin)")  # fmt: skip
    add("--tracer", default="auto", metavar="auto|symbolic|export",
        help="run the model on tensors without data, or take torch.export; auto: the first, and "
        "the other where it fails (default: auto)")  # fmt: skip
    add("--train", action="store_true", help="training mode (default: evaluation mode)")
    add("--verify", action="store_true",
        help="also rescale a float64 copy at random and print the largest relative change of its "
        "outputs (with --json on stderr); status 1 if an exact plan changes them")  # fmt: skip
    add("--why", action="append", default=[], metavar="NAME", dest="weights",
        help="instead of the tables explain what moves or pins this weight, or each weight of this "
        "module; repeatable")  # fmt: skip
    for file in REPORT_FILES:
        add(f"--{file.option}", type=Path, metavar="FILE", help=file.help)
    add("--all", action="store_true", help="leave no group, pair or blocked side out")
    add("--all-pairs", action="store_true",
        help="list every producer with every consumer of its group, not only the pairs between "
        "which no other producer or consumer lies")  # fmt: skip
    add("--json", action="store_true", help="print everything as JSON, and nothing else, on stdout")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.json and arguments.weights:
        raise ArgumentError("--why explains in sentences: it does not go with --json")
    for file in REPORT_FILES:
        check_ending(f"--{file.option}", getattr(arguments, file.option), file.endings)
    found, status = _find(arguments)
    files = [file for file in REPORT_FILES if getattr(arguments, file.option) is not None]
    for file in files:
        write_text(getattr(arguments, file.option), file.text(found.plan, found.title))
    if arguments.json:
        _print_json(found, arguments)
    elif arguments.weights:
        _print_explanations(found, arguments)
    else:
        _print_tables(found, arguments, [getattr(arguments, file.option) for file in files])
    return status


def _find(arguments: argparse.Namespace) -> tuple[_Finding, int]:
    """The plan of the target, and the exit status that its verification asks for."""
    from enorm_fx.analysis import analyze

    with (
        stdout_kept_for_json(arguments.json),
        opened(arguments, "analyzing the model", train=arguments.train) as (model, inputs),
    ):
        started = time.perf_counter()
        plan = analyze(
            model,
            inputs or None,
            batchnorm=arguments.batchnorm,
            biases=arguments.biases,
            frozen=arguments.frozen,
            tracer=arguments.tracer,
        )
        seconds = time.perf_counter() - started
        verified, status = _verified(plan) if arguments.verify else ("", 0)
    title = f"{type(model).__name__} from {arguments.target}"
    return _Finding(plan, title, seconds, verified), status


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


def _print_json(found: _Finding, arguments: argparse.Namespace) -> None:
    """The dict of the plan on stdout, and the verification on stderr."""
    print(json.dumps(found.plan.to_dict(all_pairs=arguments.all_pairs), indent=2))
    if found.verified:
        print(f"verified: {found.verified}", file=sys.stderr)


def _print_explanations(found: _Finding, arguments: argparse.Namespace) -> None:
    """What --why asks for. Nothing is printed if a weight is not found."""
    from enorm_fx.report.why import explain

    console = terminal()
    told = [explain(found.plan, name, width=console.width) for name in arguments.weights]
    console.print(found.title, style="bold")
    for text in told:
        console.print(f"\n{text}", soft_wrap=True)
    if found.verified:
        console.print(f"\nverified: {found.verified}")


def _print_tables(found: _Finding, arguments: argparse.Namespace, drawn: list[Path]) -> None:
    """The tables, with how the plan was found in their totals."""
    from enorm_fx.report.tables import show

    mode = "training" if arguments.train else "evaluation"
    tracer, seconds = found.plan.tracer, found.seconds
    notes = [("traced", f"in {mode} mode by the {tracer} front end, {seconds:.1f} s")]
    if found.verified:
        notes.append(("verified", found.verified))
    notes += [("drawn in", str(path)) for path in drawn]
    data = found.plan.to_dict(all_pairs=arguments.all_pairs)
    everything = arguments.all or arguments.all_pairs
    show(terminal(), data, title=found.title, notes=notes, everything=everything)


COMMAND = Command(
    "analyze",
    "print the rescalable pairs and groups of a model",
    _add_arguments,
    _run,
    description="Print the rescalable pairs and groups of a model, which sides of its weights "
    "are blocked and why. The model is built on the CPU; its code is run.",
    epilog="examples: enorm-fx analyze torchvision.models:resnet18; "
    "enorm-fx analyze my/net.py:Net --arg width=64 --input 2,3,32,32 --verify",
)
