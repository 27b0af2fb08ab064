"""What `enorm-fx balance` says: in the terminal, as JSON, as a figure and as a page."""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enorm_fx.cli.before_after import Kept
from enorm_fx.cli.output import terminal

if TYPE_CHECKING:
    from enorm_fx.balancing import Optimum, Report
    from enorm_fx.checkpoints.checkpoint import Checkpoint
    from enorm_fx.folding.batchnorm import Folding
    from enorm_fx.model_plan import Plan
    from enorm_fx.report.before_after import Measured


@dataclass(frozen=True, slots=True, eq=False)
class Done:
    """What the report is about. changed: how many tensors of the checkpoint."""

    plan: Plan
    checkpoint: Checkpoint
    optimum: Optimum
    report: Report
    kept: Kept
    changed: int
    folding: Folding | None


def _left_out(done: Done) -> Iterator[tuple[str, tuple[str, ...]]]:
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


def as_dict(done: Done, arguments: argparse.Namespace) -> dict[str, Any]:
    """The report in JSON types."""
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


def _facts(done: Done, arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """What was done, in sentences that each have a name."""
    from enorm_fx.report.names import plural

    report, plan = done.report, done.plan
    norm = "largest weight" if math.isinf(arguments.p) else f"sum of |w|^{arguments.p:g}"
    fall = f" ({report.norm_after / report.norm_before - 1:+.1%})" if report.norm_before else ""
    folded = []
    if done.folding is not None:
        count = plural(len(done.folding.folded), "BatchNorm")
        folded = [("folded", f"{count} into the layers before; norms are the folded model's")]
    return [
        *folded,
        (norm, f"{report.norm_before:.6g} before, {report.norm_after:.6g} after{fall}"),
        ("found", f"in {plural(report.cycles, 'cycle')}, gap to the optimum {report.gap:.1e}"),
        ("scales", f"{plan.num_scales:,} in {plural(len(plan.groups), 'group')}, "
         f"the largest factor {math.exp(report.largest_log_scale):.4g}"),
        ("checked", f"on random inputs, {done.kept}"),
        ("written", f"{arguments.output}: {plural(done.changed, 'tensor')} of "
         f"{len(done.checkpoint.tensors):,} changed"),
        *(("note", note) for note in plan.notes),
    ]  # fmt: skip


def show(done: Done, arguments: argparse.Namespace) -> None:
    """Print the report."""
    from rich.table import Table

    from enorm_fx.report.names import few

    rows = _facts(done, arguments)
    for reason, names in _left_out(done):
        rows.append(("left out", f"{reason}: {few(names, 3)}" if names else reason))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    said = ""
    for name, text in rows:
        table.add_row(name if name != said else "", text)
        said = name
    terminal().print(table)


def write_pictures(
    done: Done,
    arguments: argparse.Namespace,
    files: Mapping[str, Path],
    before: Mapping[str, Measured],
    after: Mapping[str, Measured],
) -> None:
    """The figure and the page that were asked for, into the given files: of weights and of gammas.

    files: by option, "plot" and "html".
    """
    from enorm_fx.checkpoints.atomic import synced, writing
    from enorm_fx.report.before_after import layers
    from enorm_fx.report.before_after_page import page
    from enorm_fx.report.before_after_plot import draw

    counted = {scaled.name for scaled in done.plan.parameters if scaled.counted}
    counted |= {name for name, p in done.plan.model.named_parameters() if p.dim() > 1}
    shown = layers({name: one for name, one in before.items() if name in counted}, after)
    norm = "inf" if math.isinf(arguments.p) else f"{arguments.p:g}"
    title = f"{type(done.plan.model).__name__}, balanced (p = {norm})"
    for option, file in files.items():
        path: Path = getattr(arguments, option)
        with writing(path):
            if option == "html":
                facts, left_out = _facts(done, arguments), list(_left_out(done))
                file.write_text(page(title, facts, shown, left_out), encoding="utf-8")
            else:
                draw(file, path.suffix.lstrip(".").lower(), title, shown)
            synced(file)
