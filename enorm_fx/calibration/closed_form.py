"""SmoothQuant's scales, in closed form, for all groups of a plan at once.

For a channel whose activation is at most X and whose consumers' weights are at most W,

    s = X^alpha / W^(1 - alpha)

divides the activation and multiplies the weights (Xiao et al., arXiv:2211.10438). Where the rows of
a consumer are themselves scaled, as those of `v_proj` are when `o_proj` reads on, W depends on the
scales of the groups that come later: the last ones are found first. Where groups go round in a
circle, as in a residual network without normalization, rounds are repeated. log W moves by no more
than the scales in it do, so log s = alpha log X - (1 - alpha) log W is a contraction by 1 - alpha
(weights that take powers of scales aside): there is one solution, and the rounds find it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from enorm_fx.calibration.choice import SmoothableGroup
from enorm_fx.calibration.observe import largest
from enorm_fx.plan.activations import Reader
from enorm_fx.plan.data import PlanData
from enorm_fx.step.checks import find_parameter
from enorm_fx.symmetry.solution import ScaleTerm

_MAX_ROUNDS = 1000
_SETTLED = 1e-12


def closed_form(
    plan: PlanData,
    chosen: Sequence[SmoothableGroup],
    activations: Tensor,
    alpha: float,
    limit: float,
) -> tuple[Tensor, Tensor, float]:
    """(log scales u of the plan, which scales have data, gap): float64 and bool, (num_scales,).

    activations: max |x| by scale; where it is 0 or NaN, or the weights are 0, u stays 0.
    limit: of |log s|.
    gap: the largest |change| of a log s in the last round.
    """
    u = torch.zeros(plan.num_scales + 1, dtype=torch.float64)  # the last stands for index -1
    known = torch.zeros(plan.num_scales, dtype=torch.bool)
    redo = _dependents(plan, chosen)
    pending = set(range(len(chosen)))
    gap = 0.0
    for _ in range(_MAX_ROUNDS):
        gap = 0.0
        for number in sorted(pending, reverse=True):
            pending.discard(number)
            group = chosen[number]
            x, weights = group.of(activations), _largest_weights(plan, group, u)
            alive = group.of(known).copy_((x > 0) & (weights > -math.inf))
            log_s = alpha * x.log() - (1 - alpha) * weights
            log_s = torch.where(alive, log_s, 0.0).clamp(-limit, limit)
            change = float((log_s + group.power * group.of(u[:-1])).abs().max())
            group.of(u[:-1]).copy_(-log_s / group.power)
            if change > _SETTLED:
                gap = max(gap, change)
                pending |= redo[number]
        if not pending:
            break
    return u[:-1], known, gap if pending else 0.0


def _dependents(plan: PlanData, chosen: Sequence[SmoothableGroup]) -> list[set[int]]:
    """For each group those whose weights change with its scales."""
    owner = torch.full((plan.num_scales + 1,), -1)
    for number, smoothed in enumerate(chosen):
        smoothed.of(owner[:-1]).fill_(number)
    redo: list[set[int]] = [set() for _ in chosen]
    for number, smoothed in enumerate(chosen):
        for reader in smoothed.readers:
            for position in reader.terms:
                for term in _others(reader, position):
                    for other in owner[term.index].unique().tolist():
                        if other >= 0:
                            redo[other].add(number)
    return redo


def _others(reader: Reader, position: int) -> list[ScaleTerm]:
    terms = reader.parameter.terms
    return [term for at, term in enumerate(terms) if at != position]


def _largest_weights(plan: PlanData, smoothable: SmoothableGroup, u: Tensor) -> Tensor:
    """log max |w| of what reads each of the group's channels, (channels,); -inf for zeros.

    The weights as u scales them, but without the scale of the channel itself.
    """
    group = smoothable.group
    logs = torch.full((group.channels + 1,), -math.inf, dtype=torch.float64)  # the last: no scale
    for reader in smoothable.readers:
        weight = find_parameter(plan.model, reader.parameter.name).detach()
        for position, term in reader.terms.items():
            found = _largest(weight, term.index.shape, _others(reader, position), u)
            at = torch.where(term.index < 0, group.channels, term.index - group.start)
            logs.scatter_reduce_(0, at.reshape(-1), found.reshape(-1), "amax")
    return logs[:-1]


def _largest(
    weight: Tensor, shape: Sequence[int], others: Sequence[ScaleTerm], u: Tensor
) -> Tensor:
    """log max |w * exp(other terms)| over the axes along which `shape` is 1, float64 of `shape`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    shift = 0.0
    for term in others:
        logs = term.coefficient * u[term.index]
        if bool(logs.any()):
            most = float(logs.max())  # taken out, so that nothing overflows
            shift += most
            weight = weight * (logs - most).exp().to(weight.device, wide)
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return largest(weight, axes).view(shape).cpu().double().log() + shift
