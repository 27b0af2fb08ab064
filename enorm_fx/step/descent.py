"""Solve: coordinate descent on measured cells alone, in log space.

    J(u) = sum over blocks  c^(-p * depth) * sum over cells  S * exp(p * sum of terms a * u[id])

(p = inf: maxima, factors c^-depth and exp without p). J is convex. For one scale, let M_a be the
part of J that takes exp(p * a * s) when the scale moves by s. With one positive and one negative
coefficient a, -b the minimum over s is closed:

    s = log(b * M_b / (a * M_a)) / (p * (a + b))          (p = inf: log(M_b / M_a) / (a + b))

On a chain a = b = 1: exp(s) = sqrt(R / (c L)) with the p-norms L, R of a unit's incoming and
outgoing weights (Stock et al., ICLR 2019, arXiv:1902.10416, the update of the block coordinate
descent and its asymmetric form).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from enorm_fx.step.joint_sums import Sums, joined
from enorm_fx.step.layout import Block, GroupLayout, Layout, Part, Touch
from enorm_fx.step.peaks import FEWEST, Peaks
from enorm_fx.step.sharded_cells import ShardedCells
from enorm_fx.step.shards import reduce_
from enorm_fx.step.streamed import StreamedCells

_LOG_2 = math.log(2.0)
_NEWTON_STEPS = 60


def power_of(p: float) -> float:
    """What logarithms are multiplied by: p, or 1 for maxima."""
    return 1.0 if math.isinf(p) else p


@dataclass(slots=True, eq=False)
class Descent:
    """The state of a descent: the measured cells and the log scales found so far.

    values: the cells of each block. u: float64, (num_scales + 1,); the last stays 0 and is
    what pinned positions (-1) read. peaks: what gives maxima of some blocks sooner.
    """

    layout: Layout
    values: Sequence[Tensor | StreamedCells | ShardedCells]
    p: float
    c: float
    u: Tensor
    peaks: Mapping[int, Peaks] = field(default_factory=dict)

    @property
    def power(self) -> float:
        """See `power_of`."""
        return power_of(self.p)

    def in_memory(self) -> list[Tensor]:
        """The cells of each block as tensors, those of the descent where they are in memory."""
        return [v if isinstance(v, Tensor) else v.computed() for v in self.values]


@dataclass(frozen=True, slots=True, eq=False)
class LogMarginals:
    """log M_a of a group's channels by coefficient a, each (channels,); -inf: nothing there."""

    positive: tuple[tuple[float, Tensor], ...]
    negative: tuple[tuple[float, Tensor], ...]

    def alive(self) -> Tensor:
        """Channels that have something on both sides, (channels,) bool."""
        down = torch.stack([m for _, m in self.positive]).amax(0)
        up = torch.stack([m for _, m in self.negative]).amax(0)
        return _two_sided(down, up)


def with_peaks(descent: Descent) -> Descent:
    """The same descent for p = inf, which looks at all cells of a large matrix seldom."""
    peaks = {}
    for number, (block, cells) in enumerate(
        zip(descent.layout.blocks, descent.values, strict=True)
    ):
        matrix = sorted(part.axes for part in block.parts) == [(0,), (1,)]
        large = math.prod(cells.shape) >= FEWEST and cells.shape == block.shape
        if matrix and large and not isinstance(cells, ShardedCells):
            peaks[number] = Peaks(cells)
    return replace(descent, peaks=peaks)


def sweep_(descent: Descent, exact: bool) -> None:
    """One cycle over all groups, batch by batch: descent.u moves.

    exact: every step is a multiple of log 2.
    """
    for batch in descent.layout.batches:
        groups = [descent.layout.groups[number] for number in batch]
        sides = _sides(descent, groups)
        steps = [_step(descent, g, s, exact) for g, s in zip(groups, sides, strict=True)]
        for group, step in zip(groups, steps, strict=True):
            descent.u[group.start : group.start + group.channels] += step


def pulls(descent: Descent) -> tuple[Tensor, Tensor]:
    """log P and log N of every scale at u, each (num_scales + 1,); -inf: nothing there.

    P and N are the sums of a * M_a over positive and of |a| * M_a over negative coefficients: what
    pulls the scale down and up. P - N is dJ/du / p; for p = inf they are maxima.
    """
    down, up = (torch.full_like(descent.u, -math.inf) for _ in range(2))
    groups = descent.layout.groups
    for group, sides in zip(groups, _sides(descent, groups), strict=True):
        still = descent.u.new_zeros(group.channels)
        for pull, side in ((down, sides.positive), (up, sides.negative)):
            if side:
                pull[group.start : group.start + group.channels] = _joined(descent.p, side, still)[
                    0
                ]
    return down, up


def gaps(descent: Descent) -> Tensor:
    """|P - N| / (P + N) of every scale at u, (num_scales + 1,); 0 where a side has nothing."""
    down, up = pulls(descent)
    return torch.where(_two_sided(down, up), torch.tanh((down - up).abs() / 2), 0.0)


def imbalance(descent: Descent) -> Tensor:
    """The gap at u, 0-dim: the largest of `gaps`. Dimensionless; 0 at the optimum only."""
    return gaps(descent).amax()


def alive(descent: Descent) -> Tensor:
    """Scales that have something on both sides, (num_scales + 1,) bool; the last is False."""
    return _two_sided(*pulls(descent))


def _two_sided(down: Tensor, up: Tensor) -> Tensor:
    # `!=` lets NaN through: a weight that is not finite must not look like a dead unit.
    return (down != -math.inf) & (up != -math.inf)


def log_cost(descent: Descent) -> Tensor:
    """log of the part of J that can move, at u, 0-dim."""
    touches = [
        Touch(number, 0, 1.0, slice(None), slice(None))
        for number in range(len(descent.layout.blocks))
    ]
    if not touches:
        return descent.u.new_full((), -math.inf)
    logs = torch.cat(_log_marginals(descent, touches))
    return logs.amax() if math.isinf(descent.p) else torch.logsumexp(logs, 0)


def log_factors(part: Part, u: Tensor) -> Tensor:
    """sum of coefficient * u[id] over the part's terms, flat."""
    first, *others = part.terms
    total = first.coefficient * u[first.ids]
    for term in others:
        total = total + term.coefficient * u[term.ids]
    return total


def _sides(descent: Descent, groups: Sequence[GroupLayout]) -> list[LogMarginals]:
    """The marginals of each group. Where weights lie in parts, one reduction serves all groups."""
    largest = math.isinf(descent.p)
    found = [
        joined([_sums(descent, touch) for touch in group.touches], group.channels, largest)
        for group in groups
    ]
    _reduce_(descent, [one for sums in found for one in sums])
    sides = []
    for group, sums in zip(groups, found, strict=True):
        parts: dict[float, Tensor] = {}
        for one in sums:
            total = parts.setdefault(
                one.coefficient, descent.u.new_full((group.channels,), -math.inf)
            )
            _add_(total, one.channels, one.logs(), largest)
        positive = tuple((a, parts[a]) for a in group.positive)
        sides.append(LogMarginals(positive, tuple((a, parts[a]) for a in group.negative)))
    return sides


def _reduce_(descent: Descent, sums: Sequence[Sums]) -> None:
    reduce_([(one.groups, one.values) for one in sums], math.isinf(descent.p))


def _log_marginals(descent: Descent, touches: Sequence[Touch]) -> list[Tensor]:
    """log of the sum (or maximum) of the current cells at each position of the touched parts."""
    found = [_sums(descent, touch) for touch in touches]
    _reduce_(descent, found)
    return [one.logs() for one in found]


def _sums(descent: Descent, touch: Touch) -> Sums:
    """The sum (or maximum) of the current cells at each position of the touched part; of cells in
    parts, what this process's have in it."""
    values, shift = _marginal(descent, touch)
    block, cells = descent.layout.blocks[touch.block], descent.values[touch.block]
    own = log_factors(block.parts[touch.part], descent.u)[touch.positions]
    depth = descent.power * block.depth * math.log(descent.c)
    groups = cells.shard.groups if isinstance(cells, ShardedCells) else ()
    offset = shift + descent.power * own - depth
    return Sums(touch.coefficient, values, offset, touch.channels, groups)


def _marginal(descent: Descent, touch: Touch) -> tuple[Tensor, Tensor | float]:
    """The sum (or maximum) at each position of the touched part, without its own factors: as
    exp(shift) times the first tensor. Of cells in parts, what this process's have in it."""
    block, values = descent.layout.blocks[touch.block], descent.values[touch.block]
    target = block.parts[touch.part]
    rest = [part for part in block.parts if part is not target]
    if isinstance(values, ShardedCells):
        weights, shift = _exp(descent.power * log_factors(rest[0], descent.u), values)
        largest = math.isinf(descent.p)
        return values.partial(target.axes[0], touch.positions, weights, largest), shift
    if touch.block in descent.peaks:
        logs = log_factors(rest[0], descent.u)
        weights, shift = _exp(logs, values)
        found = descent.peaks[touch.block].marginal(target.axes[0], logs, weights)
        return found[touch.positions], shift
    if isinstance(values, StreamedCells):
        return _from_stream(descent, values, touch, target.axes[0], rest)
    if _is_matrix(block, target, rest):
        return _from_matrix(descent, values, touch, target.axes[0], rest)
    sums, scale = _from_cells(descent, block, values, target, rest)
    return sums[touch.positions], scale


def _is_matrix(block: Block, target: Part, rest: list[Part]) -> bool:
    return (
        len(block.shape) == 2
        and len(target.axes) == 1
        and all(len(part.axes) == 1 and part.axes != target.axes for part in rest)
    )


def _from_matrix(
    descent: Descent, values: Tensor, touch: Touch, axis: int, rest: list[Part]
) -> tuple[Tensor, Tensor | float]:
    """Marginal along one axis of a matrix: a product with a vector, or a maximum."""
    matrix = values if axis == 0 else values.t()
    matrix = matrix[touch.positions]
    largest = math.isinf(descent.p)
    if not rest:
        return (matrix.amax(1) if largest else matrix.sum(1)), 0.0
    weights, shift = _exp(descent.power * log_factors(rest[0], descent.u), values)
    if largest:
        return (matrix * weights).amax(1), shift
    return torch.mv(matrix, weights), shift


def _from_stream(
    descent: Descent, values: StreamedCells, touch: Touch, axis: int, rest: list[Part]
) -> tuple[Tensor, Tensor | float]:
    """The same of cells that are not in memory."""
    weights, shift = _exp(descent.power * log_factors(rest[0], descent.u), values)
    return values.marginal(axis, touch.positions, weights, math.isinf(descent.p)), shift


def _from_cells(
    descent: Descent, block: Block, values: Tensor, target: Part, rest: list[Part]
) -> tuple[Tensor, Tensor | float]:
    """The same for labels on any axes: cell by cell."""
    shift: Tensor | float = 0.0
    if rest:
        logs = sum(
            (log_factors(part, descent.u).view(part.shape) for part in rest),
            start=descent.u.new_zeros(()),
        )
        weights, shift = _exp(descent.power * logs, values)
        values = (values * weights).expand(block.shape)
    axes = tuple(axis for axis in range(len(block.shape)) if axis not in target.axes)
    if axes:
        values = values.amax(axes) if math.isinf(descent.p) else values.sum(axes)
    return values.reshape(-1), shift


def _exp(logs: Tensor, values: Tensor | StreamedCells | ShardedCells) -> tuple[Tensor, Tensor]:
    """exp(logs - shift) in the values' dtype, shift = max: it cannot overflow."""
    shift = logs.max()
    return (logs - shift).exp().to(values.device, values.dtype), shift


def _add_(total: Tensor, channels: slice | Tensor, logs: Tensor, largest: bool) -> None:
    """total[channels] = log of the sum (or the maximum) of both, in place."""
    if not isinstance(channels, slice):
        logs, channels = _scatter(total, channels, logs, largest), slice(None)
    join = torch.maximum if largest else torch.logaddexp
    total[channels] = join(total[channels], logs)


def _scatter(total: Tensor, channels: Tensor, logs: Tensor, largest: bool) -> Tensor:
    if largest:
        return torch.full_like(total, -math.inf).scatter_reduce_(0, channels, logs, "amax")
    # The clamp keeps -inf - (-inf) from becoming NaN.
    shift = logs.max().clamp(min=torch.finfo(logs.dtype).min)
    return torch.zeros_like(total).index_add_(0, channels, (logs - shift).exp()).log() + shift


def _step(descent: Descent, group: GroupLayout, marginals: LogMarginals, exact: bool) -> Tensor:
    """The log step of each channel, (channels,); 0 where a side is empty.

    damping = k, with k > 1 scales in one cell: the step s of each alone is divided by k. By
    convexity a cell's exp(sum_j a_j s_j / k) <= mean over its k scales of exp(a_j s_j); summed over
    cells, J falls by at least 1 / k of what the channels would gain one by one: it never rises.
    """
    zeros = descent.u.new_zeros((group.channels,))
    if not marginals.positive or not marginals.negative:
        return zeros
    if len(marginals.positive) == len(marginals.negative) == 1:
        (a, _), (b, _) = marginals.positive[0], marginals.negative[0]
        step = -_slope(descent.p, marginals, zeros) / (descent.power * (a - b))
    else:
        step = best_step(descent.p, marginals)
    step = torch.where(marginals.alive(), step, 0.0) / group.damping
    return _to_power_of_two(step, group.symmetric) if exact else step


def _to_power_of_two(step: Tensor, symmetric: bool) -> Tensor:
    """The nearest multiple of log 2, or the nearest towards 0 where J is not symmetric.

    With coefficients a, -a the cost is symmetric about its minimum and the nearest multiple is no
    farther from it than 0 is; otherwise a point between 0 and the minimum is safe. J never rises.
    """
    exponent = step / _LOG_2
    return (exponent.round() if symmetric else exponent.trunc()) * _LOG_2


def _slope(p: float, marginals: LogMarginals, step: Tensor) -> Tensor:
    """log P - log N after a step, (channels,): rises with the step and is 0 at the minimum."""
    return _joined(p, marginals.positive, step)[0] - _joined(p, marginals.negative, step)[0]


def _joined(
    p: float, side: tuple[tuple[float, Tensor], ...], step: Tensor
) -> tuple[Tensor, Tensor]:
    """log of the side's |dJ/ds| / p, and the derivative of that log by s."""
    power, largest = power_of(p), math.isinf(p)
    logs = torch.stack([m + power * a * step for a, m in side])
    rates = step.new_tensor([power * a for a, _ in side])[:, None]
    if largest:
        value, index = logs.max(0)
        return value, rates.expand_as(logs).gather(0, index[None])[0]
    logs = logs + (rates.abs() / power).log()
    value = torch.logsumexp(logs, 0)
    share = (logs - torch.where(value == -math.inf, 0.0, value)).exp()
    return value, (share * rates).sum(0)


def best_step(p: float, marginals: LogMarginals) -> Tensor:
    """The minimum for three or more coefficients: Newton, held in a bracket by bisection."""
    step = torch.zeros_like(marginals.positive[0][1])
    start = _slope(p, marginals, step)
    slowest = power_of(p) * (marginals.positive[0][0] - marginals.negative[-1][0])
    bound = torch.where(start.isfinite(), -start / slowest, 0.0)
    low, high = bound.clamp(max=0.0), bound.clamp(min=0.0)
    for _ in range(_NEWTON_STEPS):
        up, up_rate = _joined(p, marginals.positive, step)
        down, down_rate = _joined(p, marginals.negative, step)
        slope = up - down
        low, high = torch.where(slope < 0, step, low), torch.where(slope > 0, step, high)
        guess = step - slope / (up_rate - down_rate)
        inside = (guess >= low) & (guess <= high)
        step = torch.where(inside, guess, (low + high) / 2)
    return torch.where(start.isfinite(), step, start)
