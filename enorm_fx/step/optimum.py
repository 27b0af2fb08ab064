"""To the optimum in one go: measure, converge, round where that is asked for, apply."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.converge import converge_
from enorm_fx.step.descent import Descent, log_cost
from enorm_fx.step.normal_range import HeldBack
from enorm_fx.step.precision import full_precision

_LOG_2 = math.log(2.0)


def to_optimum_(
    careful: CarefulStep,
    optimizers: Sequence[Optimizer] = (),
    buffers: Mapping[str, int] | None = None,
    *,
    tol: float,
    exact: bool,
    gradients: bool,
    polish: bool,
) -> Tensor:
    """Bring the weights that `careful` moves, and all that follows them, to the minimum of J.

    Returns the log scales by which it did, (num_scales + 1,).

    gradients: those in `.grad` follow too. tol, polish: see `converge_`. exact: round the optimum
    to powers of two; nothing moves if J would not fall.

    Raises NonFiniteError, OptimizerStateError or PlanError, with nothing written.
    """
    careful.bind_()
    with full_precision(careful.device):
        writes = careful.together(lambda: careful.collect(optimizers, buffers, gradients))
        descent, sizes = careful.measure_()
        converge_(descent, tol, polish=polish)
        if exact:
            round_(descent, careful)
        careful.apply_(descent.u, sizes, writes)
    return descent.u


def round_(descent: Descent, careful: CarefulStep) -> tuple[HeldBack, ...]:
    """Log scales to multiples of log 2 by which no number leaves its range; 0 if that is better."""
    rounded = (descent.u / _LOG_2).round() * _LOG_2
    descent.u = torch.zeros_like(rounded)
    before = log_cost(descent)
    descent.u = rounded
    held = careful.hold_in_range_(descent.u)
    if not log_cost(descent) < before:
        descent.u = torch.zeros_like(rounded)
    return held
