"""A model and the weights of a checkpoint: how a command brings them together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from enorm_fx.errors import NonFiniteError

if TYPE_CHECKING:
    from torch import nn

    from enorm_fx.checkpoints.checkpoint import Checkpoint
    from enorm_fx.checkpoints.weight_file import Edit
    from enorm_fx.model_plan import Plan
    from enorm_fx.report.before_after import Measured

T = TypeVar("T")


def map_into_(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give a model the checkpoint's weights. They stay in the files, and come when they are read;
    buffers are copied, for a model may write into them.

    Raises CheckpointError where names or shapes do not fit.
    """
    from enorm_fx.checkpoints.skeleton import fill_, fitted

    slots = fitted(model, checkpoint.tensors, str(checkpoint.path))
    fill_(model, {s: t if s.is_parameter else t.clone() for s, t in slots.items()})


def in_their_type(model: nn.Module, inputs: T) -> T:
    """Example inputs in the type of the weights, which may not be the one that the model was made
    with."""
    from torch import Tensor

    from enorm_fx.nested import replaced

    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    made: T = replaced(Tensor, inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)
    return made


def check_numbers(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raises NonFiniteError unless all weights are finite, and no buffer holds NaN."""
    from enorm_fx.step.checks import is_finite

    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not is_finite(parameter):
            raise NonFiniteError(f"'{name}' in {checkpoint.path} has entries that are not finite")
        checkpoint.release()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise NonFiniteError(f"'{name}' in {checkpoint.path} has entries that are NaN")


def under_file_names(
    plan: Plan, checkpoint: Checkpoint, edits: Mapping[str, Edit]
) -> dict[str, Edit]:
    """Edits by the names that weights have in the checkpoint, which may hold tied ones twice."""
    found: dict[str, Edit] = {}
    for scaled in plan.parameters:
        if scaled.terms and scaled.name in edits:
            for name in (scaled.name, *scaled.aliases):
                if name in checkpoint.tensors:
                    found[name] = edits[scaled.name]
    return found


def measured(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Measured]:
    """Norms and ranges of the weights, which are in the checkpoint's files; which parameters of
    one axis count, a plan will say."""
    from enorm_fx.report.before_after import measure_weights

    found = measure_weights(model, axes=1)
    checkpoint.release()
    return found
