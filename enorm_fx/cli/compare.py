"""`enorm-fx compare`: how far apart two checkpoints are, and how much of it is rescaling."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from enorm_fx.cli.both import add_both_arguments, both_opened
from enorm_fx.cli.command import Command
from enorm_fx.cli.output import stdout_kept_for_json, terminal

if TYPE_CHECKING:
    from enorm_fx.comparing import Comparison

_CLOSE = 8.0  # roundings: what is nearer in canonical form may be a rescaling


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_both_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE",
        help="draw the distances, as a .png, .svg or .pdf (needs matplotlib)")  # fmt: skip


def _run(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        from enorm_fx.report.before_after_plot import check_plot

        check_plot(arguments.plot)
    from enorm_fx.comparing import compare

    with (
        stdout_kept_for_json(arguments.json),
        both_opened(arguments, "comparing the checkpoints") as both,
    ):
        found = compare(both.a, both.b, both.inputs)
    if arguments.plot:
        from enorm_fx.cli.distances import draw

        draw(found, (str(arguments.a), str(arguments.b)), arguments.plot)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        _print(found, arguments)
    return 0


def _print(found: Comparison, arguments: argparse.Namespace) -> None:
    from rich.table import Table

    from enorm_fx.report.names import figure

    console = terminal()
    table = Table(box=None, pad_edge=False)
    table.add_column("relative l2 distance", overflow="fold")
    table.add_column("as they are", justify="right")
    table.add_column("canonical form", justify="right")
    for distance in found.tensors:
        table.add_row(distance.name, figure(distance.before), figure(distance.after))
    table.add_section()
    table.add_row("all together", figure(found.before), figure(found.after))
    console.print(table)
    console.print()
    console.print(_sentence(found))
    if arguments.plot:
        console.print(f"drawn in {arguments.plot}")


def _sentence(found: Comparison) -> str:
    """What the numbers mean."""
    if not found.before:
        return "The weights are the same."
    far = [d for d in found.tensors if d.after > _CLOSE * d.rounding]
    if not far:
        return (
            "In canonical form they differ by rounding alone: they are rescalings of one network."
        )
    return (
        f"In canonical form {len(far)} of {len(found.tensors)} tensors differ by more than "
        "rounding: they are not rescalings of one network. (A change in one moves the scales of "
        "its neighbours too, and their biases.)"
    )


COMMAND = Command(
    "compare",
    "how far apart two checkpoints are, before and after rescaling is taken out",
    _add_arguments,
    _run,
    description="Print the distance |a - b| / max(|a|, |b|) of each weight of two checkpoints, as "
    "they are and in canonical form, which is one for all rescalings of a network.",
    epilog="example: enorm-fx compare torchvision.models:resnet18 before.safetensors "
    "after.safetensors --plot distances.png",
)
