"""Even: a place for the scales along which J has no minimum.

They are chosen so that the logarithms of all cells that they move (biases too) are as small as may
be, in the sense of least squares:

    minimize over t   sum over cells that are not zero of  (log S + A u + A t)^2

with t zero for all other scales and S the l_2 norm of a cell. A producer and a consumer come to the
same geometric mean, what stands alone comes to a geometric mean of 1. Unlike J this has a minimum
for all weights; it is the same for all rescalings of a network, and a direction that it leaves open
moves zeros alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from enorm_fx.step.attained import moved_by
from enorm_fx.step.descent import Descent, log_factors
from enorm_fx.step.layout import Block

_ENOUGH = 1e-30  # of the squared residual that it began with
_MOST_STEPS = 10_000


@dataclass(frozen=True, slots=True, eq=False)
class _Cells:
    """mask: 1 for cells that are not zero and that a free scale moves, else 0; float64."""

    block: Block
    mask: Tensor

    def spread(self, u: Tensor) -> Tensor:
        """A u, by cell."""
        logs = self.mask.new_zeros(())
        for part in self.block.parts:
            logs = logs + log_factors(part, u).view(part.shape)
        return self.mask * logs

    def gather(self, values: Tensor, like: Tensor, power: int = 1) -> Tensor:
        """A' values, by scale; power=2: with squared coefficients."""
        out = torch.zeros_like(like)
        for part in self.block.parts:
            axes = tuple(axis for axis in range(len(part.shape)) if axis not in part.axes)
            line = (values.sum(axes) if axes else values).reshape(-1)
            for term in part.terms:
                ids = torch.where(term.ids >= 0, term.ids, len(out) - 1)
                out.index_add_(0, ids, term.coefficient**power * line)
        return out


def even_out_(descent: Descent, free: Tensor) -> None:
    """Move the free scales of u, (num_scales + 1,) bool, to their place; the others stay."""
    cells, residuals = [], []
    for block, values in zip(descent.layout.blocks, descent.in_memory(), strict=True):
        moved = moved_by(block, free)
        if bool(moved.any()):
            values = values.to(descent.u)
            present = moved & (values >= torch.finfo(values.dtype).tiny)
            cells.append(_Cells(block, present.to(values.dtype)))
            logs = torch.where(present, values.log() / descent.p, 0.0)
            residuals.append(logs + cells[-1].spread(descent.u))
    movable = free.to(descent.u)
    movable[-1] = 0.0
    descent.u = descent.u + _least_squares(cells, residuals, movable)


def _least_squares(cells: list[_Cells], residuals: list[Tensor], movable: Tensor) -> Tensor:
    """argmin over t of sum (residual + A t)^2: conjugate gradients on the normal equations.

    movable: 1 for the scales of t that are not held at 0. Exact but for rounding.
    """
    zero = torch.zeros_like(movable)

    def gathered(values: list[Tensor], power: int = 1) -> Tensor:
        parts = (c.gather(v, zero, power) for c, v in zip(cells, values, strict=True))
        return movable * sum(parts, start=zero)

    scale = gathered([c.mask for c in cells], power=2).clamp(min=1e-300).reciprocal() * movable
    t, rest = zero, -gathered(residuals)
    ahead = scale * rest
    direction, size = ahead, float(rest @ ahead)
    enough = _ENOUGH * size
    for _ in range(_MOST_STEPS):
        if size <= enough:
            break
        curved = gathered([c.spread(direction) for c in cells])
        length = size / float(direction @ curved)
        t, rest = t + length * direction, rest - length * curved
        ahead = scale * rest
        size, before = float(rest @ ahead), size
        direction = ahead + (size / before) * direction
    return t
