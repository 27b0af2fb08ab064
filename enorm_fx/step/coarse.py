"""The coarse correction: the best single scale for each whole group.

Plain cycles are slow where whole layers trade scale. Moving all channels of group g by t_g turns
J into

    F(t) = sum over classes k of  T_k * exp(p * (B t)_k),

T_k the total of the cells whose labels lie in the same groups with the same coefficients. It is
convex with as many unknowns as groups, and its data are sums over cells; Newton with a line
search solves it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from enorm_fx.step.descent import Descent, log_factors
from enorm_fx.step.layout import Block, Part
from enorm_fx.step.sharded_cells import ShardedCells
from enorm_fx.step.streamed import StreamedCells

_NEWTON_STEPS = 50
_HALVINGS = 40
_SOLVED = 1e-14  # of the gradient relative to F: below it steps are rounding
_LONGEST_STEP = 10.0  # of p * t: keeps exp() in range while far from the minimum


@dataclass(frozen=True, slots=True, eq=False)
class _Classes:
    """The classes of one block. numbers[k]: class of each position of part k, counts[k] many."""

    block: int
    numbers: tuple[Tensor, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Coarse:
    """classes of all blocks, B of shape (classes, groups), the group of each scale or -1."""

    classes: tuple[_Classes, ...]
    exponents: Tensor
    owner: Tensor


def make_coarse(descent: Descent, alive: Tensor) -> Coarse:
    """alive: (num_scales + 1,) bool, scales that may move; the others count as pinned."""
    owner = torch.full_like(descent.u, -1, dtype=torch.int64)
    groups = descent.layout.groups
    for number, group in enumerate(groups):
        owner[group.start : group.start + group.channels] = number
    owner = torch.where(alive, owner, -1)
    classes, rows = [], []
    for number, block in enumerate(descent.layout.blocks):
        found, exponents = _classify(number, block, owner, len(groups))
        classes.append(found)
        rows.append(exponents)
    empty = torch.zeros(0, len(groups), dtype=torch.float64)
    return Coarse(tuple(classes), torch.cat([empty, *rows]), owner)


def unbounded(descent: Descent, coarse: Coarse) -> set[int]:
    """Numbers of groups whose scale would run away: J falls along it and has no minimum.

    So it is where, say, a residual network's last weight is zero: the first one could shrink for
    ever. Draw an arc between groups for each class of cells, from the scale that divides it to the
    one that multiplies it (pinned: one common node). A class on no closed path can be made
    as small as one likes; its groups are returned. Classes with other exponents than 1 and -1
    count as closed: a group may be missed, but none is returned wrongly.
    """
    if not coarse.exponents.numel():
        return set()
    present = torch.cat([_log_totals(descent, c) for c in coarse.classes]) > -math.inf
    pinned = coarse.exponents.shape[1]
    arcs = torch.eye(pinned + 1, dtype=torch.float64)
    ends = []
    for row in coarse.exponents[present]:
        up, down = (row > 0).nonzero().flatten().tolist(), (row < 0).nonzero().flatten().tolist()
        if len(up) > 1 or len(down) > 1 or (up and down and float(row.sum())):
            for group in [*up, *down]:
                arcs[group, pinned] = arcs[pinned, group] = 1
        else:
            ends.append((*(down or [pinned]), *(up or [pinned])))
            arcs[ends[-1]] = 1
    for _ in range(max(1, pinned).bit_length()):
        arcs = (arcs @ arcs).clamp(max=1)  # paths twice as long
    return {g for tail, head in ends if not arcs[head, tail] for g in (tail, head)} - {pinned}


def correct_(descent: Descent, coarse: Coarse) -> None:
    """Move every group by its best single log scale: descent.u changes, J falls."""
    totals = [_log_totals(descent, c) for c in coarse.classes]
    if not totals or not coarse.exponents.numel():
        return
    shifts = minimize(torch.cat(totals), coarse.exponents, descent.power)
    shifts = torch.cat([shifts, shifts.new_zeros(1)]).to(descent.u)
    descent.u += shifts[coarse.owner]


def minimize(log_totals: Tensor, exponents: Tensor, power: float) -> Tensor:
    """argmin over t of sum_k exp(log_totals[k] + power * (exponents @ t)[k]), shape (groups,).

    Directions in which nothing changes are left alone.
    """
    t = torch.zeros(exponents.shape[1], dtype=torch.float64)
    present = log_totals > -math.inf
    logs, rows = log_totals[present], power * exponents[present]
    if not len(logs):
        return t
    logs = logs - logs.max()
    weights = logs.exp()
    for _ in range(_NEWTON_STEPS):
        total = weights.sum()
        gradient = rows.t() @ weights / total
        if gradient.abs().max() < _SOLVED:
            break
        hessian = rows.t() @ (weights[:, None] * rows) / total
        # Scaled to a unit diagonal, as totals differ by orders of magnitude; the pseudo-inverse
        # leaves flat directions alone, where a solve would fail.
        size = hessian.diagonal().clamp(min=1e-300).rsqrt()
        inverse = torch.linalg.pinv(size[:, None] * hessian * size, hermitian=True, rtol=1e-12)
        step = -size * (inverse @ (size * gradient))
        step = step * min(1.0, _LONGEST_STEP / float((power * step).abs().max().clamp(min=1e-300)))
        for _ in range(_HALVINGS):
            tried = (logs + rows @ (t + step)).exp()
            # Close to the minimum F no longer tells: rounding may not refuse a good step.
            if tried.sum() <= total * (1 + 1e-14):
                break
            step = step / 2
        else:
            break
        t, weights = t + step, tried
    return t


def _classify(number: int, block: Block, owner: Tensor, groups: int) -> tuple[_Classes, Tensor]:
    numbers, labels = [], []
    for part in block.parts:
        found = torch.stack([owner[term.ids] for term in part.terms])
        unique, inverse = torch.unique(found, dim=1, return_inverse=True)
        numbers.append(inverse)
        labels.append([_row(part, column, groups) for column in unique.t().tolist()])
    rows = [torch.stack(choice).sum(0) for choice in itertools.product(*labels)]
    return _Classes(number, tuple(numbers), tuple(map(len, labels))), torch.stack(rows)


def _row(part: Part, column: list[int], groups: int) -> Tensor:
    row = torch.zeros(groups, dtype=torch.float64)
    for term, group in zip(part.terms, column, strict=True):
        if group >= 0:
            row[group] += term.coefficient
    return row


def _log_totals(descent: Descent, classes: _Classes) -> Tensor:
    """log T_k of one block in the order of itertools.product, on the CPU, float64."""
    block, values = descent.layout.blocks[classes.block], descent.values[classes.block]
    logs = [descent.power * log_factors(part, descent.u) for part in block.parts]
    shifts = [x.max() for x in logs]
    scaled = [
        (x - m).exp().to(values.device, values.dtype) for x, m in zip(logs, shifts, strict=True)
    ]
    if not isinstance(values, Tensor) or _is_matrix(block):
        totals = _matrix_totals(block, values, classes, scaled)
    else:
        totals = _cell_totals(block, values, classes, scaled)
    depth = descent.power * block.depth * math.log(descent.c)
    return (totals.to(descent.u).log() + torch.stack(shifts).sum() - depth).reshape(-1).cpu()


def _is_matrix(block: Block) -> bool:
    return len(block.shape) == 2 and sorted(part.axes for part in block.parts) == [(0,), (1,)]


def _matrix_totals(
    block: Block,
    values: Tensor | StreamedCells | ShardedCells,
    classes: _Classes,
    scaled: list[Tensor],
) -> Tensor:
    first, second = (
        x.new_zeros(count, len(x)).index_put_((number, torch.arange(len(x), device=x.device)), x)
        for x, number, count in zip(
            scaled, (n.to(values.device) for n in classes.numbers), classes.counts, strict=True
        )
    )
    if block.parts[0].axes == (1,):
        return _between(second, values, first).t()
    return _between(first, values, second)


def _between(
    rows: Tensor, values: Tensor | StreamedCells | ShardedCells, columns: Tensor
) -> Tensor:
    if not isinstance(values, Tensor):
        return values.between(rows, columns)
    return rows @ values @ columns.t()


def _cell_totals(block: Block, values: Tensor, classes: _Classes, scaled: list[Tensor]) -> Tensor:
    number = torch.zeros((), dtype=torch.int64, device=values.device)
    for part, x, index, count in zip(
        block.parts, scaled, classes.numbers, classes.counts, strict=True
    ):
        values = values * x.view(part.shape)
        number = number * count + index.to(values.device).view(part.shape)
    number = number.expand(block.shape).reshape(-1)
    totals = values.new_zeros(math.prod(classes.counts))
    return totals.index_add_(0, number, values.expand(block.shape).reshape(-1))
