"""`canonicalize_`: one form for all rescalings of a network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from enorm_fx.analysis import as_plan
from enorm_fx.balancing import Report
from enorm_fx.model_plan import Plan
from enorm_fx.plan.data import PlanData
from enorm_fx.plan.records import ScaledParameter
from enorm_fx.step.apply import rescale_
from enorm_fx.step.attained import attained, moved_by
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.checks import check_finite
from enorm_fx.step.converge import converge_
from enorm_fx.step.even import even_out_
from enorm_fx.step.measure import objective
from enorm_fx.step.precision import full_precision

_TOLERANCE = 1e-10  # cycles go on to 1e-13 by themselves, where rounding admits it
_CHUNK = 1 << 21  # entries that are read at a time


def canonicalize_(
    model_or_plan: nn.Module | Plan, example_inputs: Any = None, *, batchnorm: str = "affine"
) -> Report:
    """Bring the weights to the canonical form of the network, in place.

    All rescalings of one network come to the same weights, to about 1e-12 in float64 and 1e-6 in
    float32, where a rescaling rounds every weight.

    Where J (p = 2, c = 1) has a minimum along every scale, it is the one that `balance` finds.
    Where it has none along some, `balance` keeps these as they are, and so differs from one
    rescaling to the next. Here the weights that such a scale moves are left out of J, which could
    make them as small as one likes; then these scales take the place where the logarithms of all
    that they move, biases too, have the smallest sum of squares. (Neighbouring entries that no
    scale tells apart count as one, by their l_2 norm.) So a unit that nothing leaves, or a learnt
    factor before a normalization, comes to a geometric mean of 1.

    Gradients in `.grad` are rescaled too; an optimizer's state is not, as with `balance`.

    model_or_plan, example_inputs, batchnorm: as for `balance`, and so is what is returned.

    Raises ArgumentError, NonFiniteError or PlanError, with nothing written.
    """
    plan = as_plan(model_or_plan, example_inputs, batchnorm)
    before = objective(plan)
    u, cycles, gap = canonical_scales(plan)
    rescale_(plan, u)
    return Report(before, objective(plan), cycles, float(u.abs().max()) if len(u) else 0.0, gap)


def canonical_scales(plan: PlanData) -> tuple[Tensor, int, float]:
    """Log scales to the canonical form, float64 (num_scales,); cycles and gap as in `Report`.

    Nothing is written. Raises NonFiniteError or PlanError.
    """
    check_finite(plan)
    careful = CarefulStep(plan, plan.groups, p=2.0, wide=True)
    careful.bind_()
    with full_precision(careful.device):
        descent, _ = careful.measure_()
        settled = attained(descent)
        for block, values in zip(descent.layout.blocks, descent.in_memory(), strict=True):
            values.masked_fill_(moved_by(block, ~settled), 0.0)
        cycles, gap = converge_(descent, _TOLERANCE)
        u = descent.u
    if not bool(settled.all()):
        # Biases have their say about what is left.
        every = tuple(replace(scaled, counted=True) for scaled in plan.parameters)
        careful = CarefulStep(replace(plan, parameters=every), plan.groups, p=2.0, wide=True)
        careful.bind_()
        with full_precision(careful.device):
            descent, _ = careful.measure_()
            descent.u = u.to(descent.u.device)
            even_out_(descent, ~settled.to(u.device))
            u = descent.u
    return u[:-1], cycles, gap


def canonical_parts(
    weight: Tensor, scaled: ScaledParameter, u: Tensor, multiple: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices of a parameter along its first axis, float64 on the CPU, each with its factors.

    u: log scales, float64 (num_scales + 1,), the last one 0. All slices but the last hold a
    multiple of `multiple` entries.
    """
    shape = tuple(weight.shape) or (1,)
    line = math.prod(shape[1:])
    step = multiple // math.gcd(line, multiple)
    rows = max(1, _CHUNK // max(1, line * step)) * step
    for first in range(0, shape[0], rows):
        part = weight.reshape(shape)[first : first + rows].cpu().double()
        factors = torch.ones((), dtype=torch.float64)
        for term in scaled.terms:
            index = term.index.cpu().reshape(term.index.shape or (1,))
            if len(index) > 1:
                index = index[first : first + rows]
            factors = factors * (term.coefficient * u[index]).exp()
        yield part, factors
