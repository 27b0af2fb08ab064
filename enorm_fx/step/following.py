"""What follows a weight when it is rescaled: its gradient, and what an optimizer keeps for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from enorm_fx.errors import OptimizerStateError, PlanError
from enorm_fx.step.factors import FactoredWrite, Write, separable
from enorm_fx.step.layout import Entry
from enorm_fx.step.memory import check_plain
from enorm_fx.step.optimizer_state import Buffer, FactoredMoments, state_buffers
from enorm_fx.step.shards import is_sharded, local, same_part


def gradient_write(number: int, entry: Entry, weight: nn.Parameter) -> list[Write]:
    """Of the gradient that lies in `.grad`, if there is one. number: of the entry.

    Raises PlanError for a sparse one.
    """
    if weight.grad is None:
        return []
    if weight.grad.layout != torch.strided:
        raise PlanError(
            f"the gradient of '{entry.name}' is sparse and cannot follow the weight; "
            "nothing was written. Clear it (zero_grad) before rescaling"
        )
    return [Write(number, _part(weight.grad, weight, f"the gradient of '{entry.name}'"), -1)]


def state_writes(
    number: int,
    entry: Entry,
    weight: nn.Parameter,
    optimizer: Optimizer,
    known: Mapping[str, int],
) -> list[Write]:
    """Of the buffers that an optimizer keeps for the weight. known: see `state_buffers`.

    Raises OptimizerStateError or PlanError for what cannot follow.
    """
    writes: list[Write] = []
    for buffer in state_buffers(optimizer, weight, entry.name, known):
        if isinstance(buffer, Buffer):
            what = f"the buffer '{buffer.name}' of '{entry.name}'"
            writes.append(Write(number, _part(buffer.tensor, weight, what), buffer.exponent))
        else:
            writes.append(_moments_write(number, entry, weight, buffer, type(optimizer).__name__))
    return writes


def _moments_write(
    number: int, entry: Entry, weight: nn.Parameter, moments: FactoredMoments, optimizer: str
) -> FactoredWrite:
    what = f"'{moments.name}', which {optimizer} keeps for '{entry.name}'"
    if not separable(entry):
        raise OptimizerStateError(
            f"{what}, are means of rows and of columns, and the weight's entries have factors of "
            "their own, which rows and columns cannot follow; nothing was written"
        )
    if any(map(is_sharded, (weight, moments.rows, moments.columns))):
        raise OptimizerStateError(
            f"{what}, are means over a weight that lies in parts on several processes, and cannot "
            "follow it; nothing was written"
        )
    for tensor in (moments.rows, moments.columns):
        check_plain(tensor, what)
    return FactoredWrite(number, moments.rows, moments.exponent, moments.columns)


def _part(tensor: Tensor, parameter: Tensor, what: str) -> Tensor:
    """What this process holds of a tensor that goes with a parameter. Raises PlanError."""
    if not same_part(tensor, parameter):
        raise PlanError(f"{what} is spread over processes in another way; nothing was written")
    held = local(tensor)
    check_plain(held, what)
    return held
