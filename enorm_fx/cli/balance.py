"""`enorm-fx balance`: a checkpoint whose weights are at the optimum, of the same function."""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from enorm_fx.cli.before_after import Kept, compare, run_before
from enorm_fx.cli.command import Command
from enorm_fx.cli.folded import checked, finished_, fold_
from enorm_fx.cli.output import progress, stdout_kept_for_json, terminal
from enorm_fx.cli.target import (
    add_checkpoint_arguments,
    add_target_arguments,
    opened,
    weights_of,
)
from enorm_fx.cli.weights import check_numbers, in_their_type, map_into_, under_file_names
from enorm_fx.errors import ArgumentError

if TYPE_CHECKING:
    from enorm_fx.balancing import Optimum, Report
    from enorm_fx.checkpoints.checkpoint import Checkpoint
    from enorm_fx.folding.batchnorm import Folding
    from enorm_fx.model_plan import Plan

_ROOM = 1 << 28  # bytes for sums over the weights, beside one weight at a time
_TOLERANCE = 1e-10  # the gap to stop at


@dataclass(frozen=True, slots=True, eq=False)
class _Done:
    """What the report is about. changed: how many tensors of the checkpoint."""

    plan: Plan
    checkpoint: Checkpoint
    optimum: Optimum
    report: Report
    kept: Kept
    changed: int
    folding: Folding | None


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
    add("--json", action="store_true", help="print the report as JSON, and nothing else, on stdout")


def _run(arguments: argparse.Namespace) -> int:
    from enorm_fx.checkpoints.checkpoint import open_checkpoint

    if arguments.exact and arguments.fold_batchnorm:
        raise ArgumentError(
            "--exact keeps the outputs to the last bit, and --fold-batchnorm rounds weights anew: "
            "leave one of them out"
        )
    checkpoint = open_checkpoint(weights_of(arguments))
    with stdout_kept_for_json(arguments.json):
        done = _balance(arguments, checkpoint)
    if arguments.json:
        print(json.dumps(_as_dict(done, arguments), indent=2))
    else:
        _print(done, arguments)
    return 0


def _balance(arguments: argparse.Namespace, checkpoint: Checkpoint) -> _Done:
    """Find the scales, check them, write the output, check that; then it appears."""
    from enorm_fx.analysis import analyze
    from enorm_fx.balancing import find_optimum
    from enorm_fx.checkpoints.checkpoint import copied

    with (
        opened(arguments, "balancing the model", empty=True) as (model, inputs),
        progress() as show,
    ):
        show("reading", None)
        map_into_(model, checkpoint)
        check_numbers(model, checkpoint)
        show("analyzing", None)
        inputs = in_their_type(model, inputs)
        folding = fold_(model, checkpoint, inputs or None) if arguments.fold_batchnorm else None
        plan = analyze(model, inputs or None, batchnorm="affine", frozen="rescale")
        started: list[float] = []

        def watch(cycles: int, gap: float) -> None:
            started.append(max(gap, _TOLERANCE))
            way = math.log(started[0] / _TOLERANCE) or 1.0
            show("balancing", math.log(started[0] / started[-1]) / way)
            checkpoint.release()

        optimum = find_optimum(
            plan, p=arguments.p, tol=_TOLERANCE, exact=arguments.exact, room=_ROOM, watch=watch
        )
        edits = optimum.careful.edits(optimum.log_scales, optimum.sizes)
        file_edits = under_file_names(plan, checkpoint, edits)
        if folding is not None:
            file_edits, norm = finished_(folding, plan, edits, arguments.p, checkpoint)
            edits = {}  # the files' weights have none of their own, then
        show("running the model before", None)
        before = run_before(model, plan.inputs, edits, checkpoint.release)
        show("writing", None)
        with copied(checkpoint, arguments.output, file_edits) as copy:
            show("running the model after", None)
            map_into_(model, copy)
            kept = compare(before, model, copy.release)
            if folding is None:
                norm = plan.norm(arguments.p)
            else:
                kept = checked(kept, before, model, copy)
    report = optimum.report(norm)
    return _Done(plan, checkpoint, optimum, report, kept, len(file_edits), folding)


def _left_out(done: _Done) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What was not balanced or copied: why, and the names that it is about."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for group, reason in done.optimum.still:
        reasons[f"groups that stay: {reason}"] += [*group.producers, *group.consumers]
    if done.optimum.dead:
        yield f"{done.optimum.dead:,} channels that are zero on one side stay", ()
    for held in done.report.held_back:
        reasons[f"scales held back: {held.reason}"].append(held.weight)
    for blocked in done.plan.blocked:
        reasons[f"sides that stay: {blocked.reason}"].append(f"{blocked.weight} ({blocked.side})")
    for alone in done.folding.left if done.folding is not None else ():
        reasons[f"BatchNorm that stays: {alone.reason}"].append(alone.module)
    for reason, names in reasons.items():
        yield reason, tuple(names)
    if done.checkpoint.left:
        yield "files not copied: other weights", tuple(p.name for p in done.checkpoint.left)


def _as_dict(done: _Done, arguments: argparse.Namespace) -> dict[str, Any]:
    report, kept = done.report, done.kept
    return {
        "p": "inf" if math.isinf(arguments.p) else arguments.p,
        "exact": arguments.exact,
        "output": str(arguments.output),
        "norm_before": report.norm_before,
        "norm_after": report.norm_after,
        "cycles": report.cycles,
        "gap": report.gap,
        "largest_factor": math.exp(report.largest_log_scale),
        "groups": len(done.plan.groups),
        "scales": done.plan.num_scales,
        "tensors_changed": done.changed,
        "folded": None if done.folding is None else [f.batchnorm for f in done.folding.folded],
        "verified": {
            "float64_change": kept.double,
            "dtype": kept.dtype,
            "before": None if kept.skipped else kept.before,
            "after": None if kept.skipped else kept.after,
            "identical": kept.identical,
            "skipped": kept.skipped or None,
        },
        "left_out": [{"reason": reason, "names": names} for reason, names in _left_out(done)],
        "notes": done.plan.notes,
    }


def _print(done: _Done, arguments: argparse.Namespace) -> None:
    from rich.table import Table

    from enorm_fx.report.names import few, plural

    report, plan = done.report, done.plan
    norm = "largest weight" if math.isinf(arguments.p) else f"sum of |w|^{arguments.p:g}"
    fall = f" ({report.norm_after / report.norm_before - 1:+.1%})" if report.norm_before else ""
    rows = [
        (norm, f"{report.norm_before:.6g} before, {report.norm_after:.6g} after{fall}"),
        ("found", f"in {plural(report.cycles, 'cycle')}, gap to the optimum {report.gap:.1e}"),
        ("scales", f"{plan.num_scales:,} in {plural(len(plan.groups), 'group')}, "
         f"the largest factor {math.exp(report.largest_log_scale):.4g}"),
        ("checked", f"on random inputs, {done.kept}"),
        ("written", f"{arguments.output}: {plural(done.changed, 'tensor')} of "
         f"{len(done.checkpoint.tensors):,} changed"),
    ]  # fmt: skip
    if done.folding is not None:
        count = plural(len(done.folding.folded), "BatchNorm")
        rows.insert(0, ("folded", f"{count} into the layers before; norms are the folded model's"))
    for reason, names in _left_out(done):
        listed = f": {few(names, 3)}" if names else ""
        rows.append(("left out", f"{reason}{listed}"))
    rows += [("note", note) for note in plan.notes]
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    said = ""
    for name, text in rows:
        table.add_row(name if name != said else "", text)
        said = name
    terminal().print(table)


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
