"""`balance`: bring a trained model's weights to the unique optimum, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from enorm_fx.analysis import as_plan
from enorm_fx.errors import ArgumentError
from enorm_fx.model_plan import Plan
from enorm_fx.plan.records import Group
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.checks import check_exact, check_finite, check_settings
from enorm_fx.step.converge import converge_
from enorm_fx.step.descent import alive
from enorm_fx.step.measure import objective
from enorm_fx.step.normal_range import HeldBack
from enorm_fx.step.optimum import round_
from enorm_fx.step.precision import full_precision


@dataclass(frozen=True, slots=True)
class Report:
    """What `balance` did.

    norm_before, norm_after: J, see `objective`.
    cycles:            descent cycles that were run.
    largest_log_scale: the largest |log d| over all scales.
    gap:               how far from the optimum it stopped (before rounding, with exact=True):
                       the largest |P - N| / (P + N) over channels, P and N what pulls a channel's
                       scale down and up in J; for p = inf, the same of the maxima. Larger than
                       tol if 1000 cycles did not reach it.
    held_back:         with exact=True, scales that stay closer to 1 than they should, since a
                       weight would overflow or fall below the normal range of its dtype.
    """

    norm_before: float
    norm_after: float
    cycles: int
    largest_log_scale: float
    gap: float
    held_back: tuple[HeldBack, ...] = ()


def balance(
    model_or_plan: nn.Module | Plan,
    example_inputs: Any = None,
    *,
    p: float = 2,
    c: float = 1.0,
    tol: float = 1e-10,
    exact: bool = False,
    batchnorm: str = "affine",
) -> Report:
    """Bring the weights to the minimum of J, every group, the last too. In place.

    p, c:        as for `ENorm`.
    exact:       round the optimum to powers of two. Outputs then stay the same to the last bit, in
                 float32, bfloat16 and float16, while activations stay normal numbers of their
                 dtype. Weights do: what would take one out of the normal range is held back, and
                 `Report.held_back` says so. (Of many float16 weights some are close to its end,
                 6.1e-5, so few units can shrink.) The weights stay if J would not fall.
    tol:         the largest gap (see `Report`) to stop at. For p < inf a few more cycles bring it
                 to rounding, so that all rescalings of one network end in the same weights. After
                 1000 cycles it stops anyway, and the report's gap says where.
    example_inputs, batchnorm: for `analyze`, if a model is given.

    p = inf balances the largest |w| that enters each channel with the largest that leaves it. There
    are many such states; this one is reached from the optimum of the l_2 norm (of the largest |w|
    of each cell), which is unique, by cycles in the order of the plan's groups. So it is the same
    for all rescalings of one network, too.

    Groups along which J has no minimum keep their scale: those with nothing in J on one side, and
    those that could only shrink other weights for ever (p < inf), as where the last weight of
    a residual network is zero.

    Gradients in `.grad` are rescaled too. An optimizer that already holds state for this model
    would be left behind: balance before training, or use `ENorm`.

    Raises ArgumentError, NonFiniteError or PlanError, with nothing written.
    """
    plan = as_plan(model_or_plan, example_inputs, batchnorm)
    found = find_optimum(plan, p=p, c=c, tol=tol, exact=exact)
    careful = found.careful
    with full_precision(careful.device):
        writes = careful.collect((), None, gradients=True)
        careful.apply_(found.log_scales, found.sizes, writes)
    return found.report(objective(plan, p, c))


@dataclass(frozen=True, slots=True, eq=False)
class Optimum:
    """The scales that bring a plan's weights to the minimum of J; nothing is written yet.

    log_scales, sizes: what `CarefulStep.apply_` and `edits` take.
    still: groups that stay as they are, and why.
    dead:  channels of other groups that stay, since one side of them is zero.
    The others are as in `Report`.
    """

    careful: CarefulStep
    log_scales: Tensor
    sizes: Tensor
    norm_before: float
    cycles: int
    gap: float
    held_back: tuple[HeldBack, ...]
    still: tuple[tuple[Group, str], ...]
    dead: int

    def report(self, norm_after: float) -> Report:
        """What `balance` says when the scales have been applied."""
        largest = float(self.log_scales.abs().amax())
        return Report(self.norm_before, norm_after, self.cycles, largest, self.gap, self.held_back)


def find_optimum(
    plan: Plan,
    *,
    p: float = 2,
    c: float = 1.0,
    tol: float = 1e-10,
    exact: bool = False,
    room: int | None = None,
    watch: Callable[[int, float], None] | None = None,
) -> Optimum:
    """Find what `balance` applies, with the same settings and errors. Nothing is written.

    room:  as for `CarefulStep`: bytes that sums over the weights may take.
    watch: told the number of cycles and the gap before the first cycle and after each one.
    """
    check_settings({"p": p, "c": c, "exact": exact})
    if not (isinstance(tol, float | int) and 0 < tol < 1):
        raise ArgumentError(f"tol must be between 0 and 1, not {tol!r}")
    p = float(p)
    exact = check_exact(plan, exact)
    careful = CarefulStep(plan, plan.groups, p=p, c=c, exact=exact, wide=True, room=room)
    careful.bind_()
    careful.together(lambda: check_finite(plan))
    before = objective(plan, p, c)
    with full_precision(careful.device):
        descent, sizes = careful.measure_()
        two_sided = alive(descent)
        cycles, gap = converge_(descent, tol, watch)
        still, dead = _still(plan, two_sided, descent.u)
        held = round_(descent, careful) if exact else ()
    return Optimum(careful, descent.u, sizes, before, cycles, gap, held, still, dead)


def _still(plan: Plan, two_sided: Tensor, u: Tensor) -> tuple[tuple[tuple[Group, str], ...], int]:
    """Groups that the optimum leaves alone and why; dead channels of the others."""
    still, dead = [], 0
    for group in plan.groups:
        own = slice(group.start, group.start + group.channels)
        alive_here = int(two_sided[own].sum())
        if not alive_here:
            still.append((group, "one side has nothing but zeros, or nothing that counts"))
        elif bool(u[own].any()):
            dead += group.channels - alive_here
        else:
            still.append((group, "it is balanced already, or the norm has no minimum along it"))
    return tuple(still), dead
