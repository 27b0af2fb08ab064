"""`enorm-fx balance`: a checkpoint whose weights are at the optimum, of the same function."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from enorm_fx.cli.balance_report import Done, as_dict, show, write_pictures
from enorm_fx.cli.before_after import compare, run_before
from enorm_fx.cli.command import Command
from enorm_fx.cli.folded import checked, finished_, fold_
from enorm_fx.cli.output import HTML, check_ending, progress, stdout_kept_for_json
from enorm_fx.cli.target import (
    add_checkpoint_arguments,
    add_target_arguments,
    opened,
    weights_of,
)
from enorm_fx.cli.weights import (
    check_numbers,
    in_their_type,
    map_into_,
    measured,
    under_file_names,
)
from enorm_fx.errors import ArgumentError

if TYPE_CHECKING:
    from enorm_fx.checkpoints.checkpoint import Checkpoint

_ROOM = 1 << 26  # bytes for sums over the weights, beside one weight at a time
_TOLERANCE = 1e-10  # the gap to stop at


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target_arguments(parser)
    add_checkpoint_arguments(parser, "balanced")
    add = parser.add_argument
    add("--p", type=float, default=2.0, metavar="P",
        help="minimize the l_P norm; inf: cross-layer equalization (default: 2)")  # fmt: skip
    add("--exact", action="store_true",
        help="powers of two as factors: outputs stay the same to the last bit")  # fmt: skip
    add("--fold-batchnorm", action="store_true",
        help="first fold each BatchNorm into the layer before it, where that is exact; it is an "
        "identity in the output, which TARGET loads as before")  # fmt: skip
    add("--plot", type=Path, metavar="FILE",
        help="also draw a figure (.png, .pdf, .svg): ranges of channels and norms, before and "
        "after")  # fmt: skip
    add("--html", type=Path, metavar="FILE", help="also write the report as a page for a browser")
    add("--json", action="store_true", help="print the report as JSON, and nothing else, on stdout")


def _run(arguments: argparse.Namespace) -> int:
    from enorm_fx.checkpoints.checkpoint import check_output, open_checkpoint
    from enorm_fx.report.before_after_plot import check_plot

    if arguments.exact and arguments.fold_batchnorm:
        raise ArgumentError(
            "--exact keeps the outputs to the last bit, and --fold-batchnorm rounds weights anew: "
            "leave one of them out"
        )
    if arguments.plot is not None:
        check_plot(arguments.plot)
    check_ending("--html", arguments.html, HTML)
    checkpoint = open_checkpoint(weights_of(arguments))
    check_output(checkpoint, arguments.output)
    with stdout_kept_for_json(arguments.json):
        done = _balance(arguments, checkpoint)
    if arguments.json:
        print(json.dumps(as_dict(done, arguments), indent=2))
    else:
        show(done, arguments)
    return 0


def _balance(arguments: argparse.Namespace, checkpoint: Checkpoint) -> Done:
    """Find the scales, check them, write the output, check that; then it appears."""
    from enorm_fx.analysis import analyze
    from enorm_fx.balancing import find_optimum
    from enorm_fx.checkpoints.atomic import new_file
    from enorm_fx.checkpoints.checkpoint import copied

    with (
        opened(arguments, "balancing the model", empty=True) as (model, inputs),
        progress() as tell,
        contextlib.ExitStack() as outputs,
    ):
        tell("reading", None)
        map_into_(model, checkpoint)
        check_numbers(model, checkpoint)
        pictures = {
            option: outputs.enter_context(new_file(path))
            for option in ("plot", "html")
            if (path := getattr(arguments, option)) is not None
        }
        old = measured(model, checkpoint) if pictures else {}
        tell("analyzing", None)
        inputs = in_their_type(model, inputs)
        folding = fold_(model, checkpoint, inputs or None) if arguments.fold_batchnorm else None
        plan = analyze(model, inputs or None, batchnorm="affine", frozen="rescale")
        started: list[float] = []

        def watch(cycles: int, gap: float) -> None:
            started.append(max(gap, _TOLERANCE))
            way = math.log(started[0] / _TOLERANCE) or 1.0
            tell("balancing", max(0.0, math.log(started[0] / started[-1]) / way))
            checkpoint.release()

        optimum = find_optimum(
            plan, p=arguments.p, tol=_TOLERANCE, exact=arguments.exact, room=_ROOM, watch=watch
        )
        edits = optimum.careful.edits(optimum.log_scales, optimum.sizes)
        file_edits = under_file_names(plan, checkpoint, edits)
        if folding is not None:
            file_edits, norm = finished_(folding, plan, edits, arguments.p, checkpoint)
            edits = {}  # the files' weights have none of their own, then
        tell("running the model before", None)
        before = run_before(model, plan.inputs, edits, checkpoint.release)
        tell("writing", None)
        copy = outputs.enter_context(copied(checkpoint, arguments.output, file_edits))
        tell("running the model after", None)
        map_into_(model, copy)
        kept = compare(before, model, copy.release)
        if folding is None:
            norm = plan.norm(arguments.p)
        else:
            kept = checked(kept, before, model, copy)
        report = optimum.report(norm)
        done = Done(plan, checkpoint, optimum, report, kept, len(file_edits), folding)
        if pictures:
            write_pictures(done, arguments, pictures, old, measured(model, copy))
    return done


COMMAND = Command(
    "balance",
    "bring a checkpoint's weights to the optimum, or equalize its layers (--p inf)",
    _add_arguments,
    _run,
    description="Write a checkpoint of the same function whose weights have the smallest l_p norm. "
    "The model runs on random inputs before and after; if its outputs differ, nothing is written. "
    "Weights stay in their files and come into memory one at a time.",
    epilog="example: enorm-fx balance torchvision.models:squeezenet1_1 "
    "--checkpoint squeezenet.safetensors --output balanced.safetensors",
)
