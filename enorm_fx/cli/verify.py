"""`enorm-fx verify`: do two checkpoints compute the same function, and are they rescalings?"""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from enorm_fx.cli.both import add_both_arguments, both_opened
from enorm_fx.cli.command import Command
from enorm_fx.cli.output import stdout_kept_for_json, terminal

if TYPE_CHECKING:
    from enorm_fx.agreement import Agreement

_DIFFERENT = 1  # exit status


def _run(arguments: argparse.Namespace) -> int:
    from enorm_fx.agreement import agreement
    from enorm_fx.analysis import analyze
    from enorm_fx.fingerprinting import fingerprint

    with (
        stdout_kept_for_json(arguments.json),
        both_opened(arguments, "comparing the checkpoints") as both,
    ):
        prints = fingerprint(both.a, both.inputs), fingerprint(both.b, both.inputs)
        call = analyze(both.a, both.inputs, batchnorm="affine").inputs
        found = agreement(both.a, both.b, call)
    rescaling = prints[0] == prints[1]
    if arguments.json:
        print(json.dumps(_as_dict(found, rescaling), indent=2))
    else:
        _print(found, rescaling)
    return 0 if found.same else _DIFFERENT


def _as_dict(found: Agreement, rescaling: bool) -> dict[str, Any]:
    """In JSON types; what is infinite is None."""
    errors = found.errors or (None, None)
    return {
        "same": found.same,
        "rescaling": rescaling,
        "limit": found.limit,
        "outputs": [
            {
                "shape": list(output.shape),
                "change_in_float64": _number(output.double),
                "change_in_own_dtype": _number(output.own),
            }
            for output in found.outputs
        ],
        "dtypes": list(found.dtypes),
        "distance_to_float64": [_number(error) for error in errors],
        "not_compared_in_own_dtype": found.skipped,
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _print(found: Agreement, rescaling: bool) -> None:
    from rich.table import Table

    console = terminal()
    table = Table(box=None, pad_edge=False)
    table.add_column("output")
    table.add_column("shape")
    own = " and ".join(dict.fromkeys(found.dtypes))
    for name in ("float64", *(() if own == "float64" else (own,))):
        table.add_column(f"change in {name}", justify="right")
    for number, output in enumerate(found.outputs):
        figures = [f"{output.double:.1e}"]
        if own != "float64":
            figures.append("-" if output.own is None else f"{output.own:.1e}")
        shape = " x ".join(map(str, output.shape)) or "a number"
        table.add_row(str(number), shape, *figures)
    console.print(table)
    console.print()
    for sentence in _sentences(found, rescaling, own):
        console.print(sentence)


def _sentences(found: Agreement, rescaling: bool, own: str) -> list[str]:
    said = []
    if not found.same_in_double:
        worst = max(range(len(found.outputs)), key=lambda n: found.outputs[n].double)
        said.append(
            f"Different: output {worst} changes by {found.largest:.1e} in float64, relative to its "
            f"largest entry; rounding the weights explains {found.limit:.1e} at most."
        )
    elif not found.same_in_own and found.errors:
        a, b = found.errors
        said.append(
            f"Different in {own}: the outputs of A are within {a:.1e} of those in float64, those "
            f"of B within {b:.1e} (inf: not finite). In float64 they are the same."
        )
    else:
        said.append(
            f"Same: no output changes by more than {found.largest:.1e} in float64; rounding the "
            f"weights explains {found.limit:.1e}."
        )
    if found.skipped:
        said.append(f"Not compared in {own}: {found.skipped}")
    return [*said, _about_weights(found, rescaling)]


def _about_weights(found: Agreement, rescaling: bool) -> str:
    """Whether the weights are rescalings of one another, and what follows."""
    if rescaling and found.same_in_double:
        return "The weights are rescalings of one another, or equal."
    if rescaling:
        return (
            "Yet the weights are rescalings of one another: they lost digits, or the model "
            "computes with more than its parameters and buffers."
        )
    if found.dtypes[0] != found.dtypes[1]:
        return "Types differ, so whether the weights are rescalings is not said: see compare."
    if found.same_in_double:
        return (
            "The weights are no rescalings of one another: they differ by something else "
            "(units in another order, weights that nothing reads, a change below what outputs "
            "show), or where these random inputs do not reach."
        )
    return "The weights are no rescalings of one another."


COMMAND = Command(
    "verify",
    "do two checkpoints compute the same function?",
    add_both_arguments,
    _run,
    description="Run the model with the weights of A and of B on the same random inputs, in "
    "float64 and in the type of the weights. Exit status 0: the same outputs but for rounding; "
    "1: different; 2: an error.",
    epilog="example: enorm-fx verify torchvision.models:resnet18 before.safetensors "
    "after.safetensors",
)
