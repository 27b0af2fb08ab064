"""Two checkpoints of one target, as two models."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from enorm_fx.cli.target import add_target_arguments, opened
from enorm_fx.cli.weights import check_numbers, in_their_type

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class Both:
    """A model with the weights of A, one with those of B, and what --input describes.

    inputs: in the type of A's weights; None where there is no --input.
    """

    a: nn.Module
    b: nn.Module
    inputs: tuple[Tensor, ...] | dict[str, Tensor] | None


def add_both_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare TARGET, A, B and what goes with them: what `both_opened` reads."""
    add_target_arguments(parser)
    for name in ("a", "b"):
        parser.add_argument(name, type=Path, metavar=name.upper(),
            help="weights: a file, an index of shards or a folder; never written to")  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, and nothing else, on stdout"
    )


@contextlib.contextmanager
def both_opened(arguments: argparse.Namespace, doing: str) -> Iterator[Both]:
    """The target with the weights of A and of B, in evaluation mode. doing: as for `opened`.

    Raises what `opened` and `open_checkpoint` raise; CheckpointError where weights do not fit the
    model, NonFiniteError where one is not finite.
    """
    from enorm_fx.verifying import independent_copy

    with opened(arguments, doing, empty=True) as (model, inputs):
        models = independent_copy(model), independent_copy(model)
        for filled, path in zip(models, (arguments.a, arguments.b), strict=True):
            _fill_(filled, path)
        yield Both(*models, in_their_type(models[0], inputs) or None)


def _fill_(model: nn.Module, path: Path) -> None:
    """Give a model a checkpoint's weights, in memory of their own."""
    from enorm_fx.checkpoints.checkpoint import open_checkpoint
    from enorm_fx.checkpoints.skeleton import fill_, fitted

    checkpoint = open_checkpoint(path)
    slots = fitted(model, checkpoint.tensors, str(path))
    fill_(model, {slot: tensor.clone() for slot, tensor in slots.items()})
    check_numbers(model, checkpoint)
    checkpoint.release()
