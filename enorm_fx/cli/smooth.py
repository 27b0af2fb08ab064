"""`enorm-fx smooth`: a checkpoint with smoothed activations, from calibration data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from enorm_fx.cli.command import Command
from enorm_fx.cli.output import stdout_kept_for_json, terminal
from enorm_fx.cli.target import (
    TargetError,
    add_checkpoint_arguments,
    add_target_arguments,
    found,
    importable,
    opened,
    parse,
    weights_of,
)
from enorm_fx.cli.weights import under_file_names
from enorm_fx.errors import ArgumentError, EnormError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from enorm_fx.checkpoints.checkpoint import Checkpoint
    from enorm_fx.checkpoints.weight_file import Edit
    from enorm_fx.model_plan import Plan
    from enorm_fx.smoothing import Smoothing

_ROUNDING = 1e-6  # relative change of float64 outputs above which a rescaling did not keep them
_NAMES = 3  # of consumers in a line


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target_arguments(parser)
    add_checkpoint_arguments(parser, "smoothed")
    add = parser.add_argument
    add("--batches", required=True, metavar="SOURCE",
        help="calibration data: package.module:name or path/to/file.py:name of an iterable, or "
        "of a function that returns one; each item is an input, a tuple of inputs or a dict by "
        "name")  # fmt: skip
    add("--alpha", type=float, default=0.5, metavar="A",
        help="above 0 and at most 1: how much of the spread of activations goes into the weights "
        "(default: 0.5)")  # fmt: skip
    add("--method", default="smoothquant", metavar="smoothquant|awq",
        help="a closed form, or a search for what quantizes best "
        "(default: smoothquant)")  # fmt: skip
    add("--bits", type=int, default=4, metavar="N", help="of the weights, for awq (default: 4)")
    add("--group-size", type=int, default=128, metavar="N",
        help="inputs that are quantized together, for awq; 0: all of an output "
        "(default: 128)")  # fmt: skip
    add("--json", action="store_true", help="print the report as JSON, and nothing else, on stdout")


def _run(arguments: argparse.Namespace) -> int:
    from enorm_fx.analysis import analyze
    from enorm_fx.checkpoints.checkpoint import check_output, copied, open_checkpoint
    from enorm_fx.smoothing import smooth
    from enorm_fx.verifying import verify

    checkpoint = open_checkpoint(weights_of(arguments))
    check_output(checkpoint, arguments.output)
    with (
        stdout_kept_for_json(arguments.json),
        opened(arguments, "smoothing the model", empty=True) as (model, inputs),
    ):
        _fill(model, checkpoint)
        batches = _batches(arguments.batches)
        plan = analyze(model, inputs or batches[0], batchnorm="affine", frozen="rescale")
        verified = verify(plan)
        if not verified.largest_change <= _ROUNDING:
            raise EnormError(
                "rescaling a float64 copy at random changed its outputs by "
                f"{verified.largest_change:.1e}: nothing was written. Please report this model"
            )
        report = smooth(
            plan, batches, alpha=arguments.alpha, method=arguments.method, bits=arguments.bits,
            group_size=arguments.group_size or None,
        )  # fmt: skip
    with copied(checkpoint, arguments.output, _edits(plan, checkpoint)):
        pass
    if arguments.json:
        print(json.dumps(_as_dict(report, verified.largest_change), indent=2))
    else:
        _print(report, verified.largest_change, arguments)
    return 0


def _fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """The model with the checkpoint's weights, in memory of its own."""
    from enorm_fx.checkpoints.skeleton import fill_, fitted

    slots = fitted(model, checkpoint.tensors, str(checkpoint.path))
    fill_(model, {slot: tensor.clone() for slot, tensor in slots.items()})
    checkpoint.release()


def _batches(source: str) -> list[Any]:
    """What --batches names, as a list."""
    target = parse(source)
    with importable(target):
        made = found(target)
        made = made() if callable(made) and not isinstance(made, Iterable) else made
        if not isinstance(made, Iterable) or isinstance(made, str | dict):
            raise TargetError(f"--batches {source} is no iterable, but a {type(made).__name__}")
        batches = list(made)
    if not batches:
        raise ArgumentError(f"--batches {source} is empty: nothing to calibrate with")
    return batches


def _edits(plan: Plan, checkpoint: Checkpoint) -> dict[str, Edit]:
    """For each weight that moves, by its names in the checkpoint, its new values."""
    moved = (scaled.name for scaled in plan.parameters if scaled.terms)
    new = {n: partial(_replace_, plan.model.get_parameter(n).detach()) for n in moved}
    return under_file_names(plan, checkpoint, new)


def _replace_(values: Tensor, tensor: Tensor) -> None:
    tensor.copy_(values)


def _as_dict(report: Smoothing, change: float) -> dict[str, Any]:
    groups = [
        {
            "producers": done.group.producers,
            "consumers": done.group.consumers,
            "channels": done.group.channels,
            "dead": done.dead,
            "largest_scale": done.largest_scale,
            "ratio": done.ratio,
            "error": done.error,
        }
        for done in report.groups
    ]
    left_out = [
        {"producers": group.producers, "consumers": group.consumers, "reason": reason}
        for group, reason in report.left_out
    ]
    return {
        "method": report.method,
        "batches": report.batches,
        "channels": report.channels,
        "largest_scale": report.largest_scale,
        "gap": report.gap,
        "verified_change": change,
        "groups": groups,
        "left_out": left_out,
    }


def _print(report: Smoothing, change: float, arguments: argparse.Namespace) -> None:
    from rich.table import Table

    console = terminal()
    table = Table(box=None, pad_edge=False)
    searched = report.method == "awq"
    columns = ("channels", "largest scale", *(("ratio", "error") if searched else ()))
    for name in columns:
        table.add_column(name, justify="right")
    for name in ("scaled down", "scaled up"):
        table.add_column(name, overflow="fold")
    for done in report.groups:
        figures = [str(done.group.channels), f"{done.largest_scale:.3g}"]
        if searched:
            figures += [f"{done.ratio:.2f}", f"{done.error:.3f}"]
        table.add_row(*figures, _listed(done.group.producers), _listed(done.group.consumers))
    console.print(table)
    console.print()
    for group, reason in report.left_out:
        names = f"{_listed(group.producers)} and {_listed(group.consumers)}"
        console.print(f"left alone: {names}: {reason}")
    console.print(
        f"{len(report.groups)} groups, {report.channels} channels, calibrated with "
        f"{report.batches} batches; {arguments.output} holds the same function (largest relative "
        f"change of the outputs {change:.1e}, random rescalings in float64)"
    )


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more


COMMAND = Command(
    "smooth",
    "scale activations into the weights that read them, so that both quantize well",
    _add_arguments,
    _run,
    description="Write a checkpoint of the same function whose activations quantize better: "
    "SmoothQuant's or AWQ's scales for every group of the model's plan.",
    epilog="example: enorm-fx smooth my_model.py:build --checkpoint model.safetensors "
    "--output smoothed.safetensors --batches my_data.py:calibration",
)
