"""Normal range: a power of two keeps every digit of a number while the product is a normal number.

One that overflows is lost. One that becomes subnormal loses digits, and where subnormal numbers are
flushed to zero, as on many devices, all of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from enorm_fx.step.descent import log_factors
from enorm_fx.step.layout import Entry
from enorm_fx.step.measure import by_cells, reduced_axes

_LOG_2 = math.log(2.0)


@dataclass(frozen=True, slots=True)
class HeldBack:
    """Scales that stay closer to 1 than they should, since a number would leave its normal range.

    weight: the parameter with that number. scales: how many. reason: for people.
    """

    weight: str
    scales: int
    reason: str


def hold_in_range_(u: Tensor, pairs: Iterable[tuple[Entry, nn.Parameter]]) -> tuple[HeldBack, ...]:
    """Bring scales closer to 0 until no number leaves the normal range of its dtype.

    u: float64 (num_scales + 1,), multiples of log 2, the last one 0; changed in place. A scale that
    takes a number out of the range is halved (to a multiple of log 2) until it does not, which it
    does not at 0: a number that is subnormal already may grow, and stays where it should shrink.
    """
    pairs = list(pairs)
    held = torch.zeros_like(u, dtype=torch.bool)
    counts: Counter[tuple[str, str]] = Counter()
    moved = True
    while moved:
        moved = False
        for entry, weight in pairs:
            for sign, reason, cells in _leaving(entry, weight.detach(), u):
                scales = _movers(entry, cells, sign, u)
                u[scales] = ((u[scales] / _LOG_2).round() / 2).trunc() * _LOG_2
                counts[entry.name, reason] += int((scales & ~held).sum())
                held |= scales
                moved = True
    return tuple(HeldBack(name, n, reason) for (name, reason), n in counts.items() if n)


def _leaving(entry: Entry, weight: Tensor, u: Tensor) -> list[tuple[int, str, Tensor]]:
    """Cells with a number that would overflow (1) or become subnormal (-1), and the reason."""
    shift = torch.zeros((), dtype=u.dtype, device=u.device)
    for part in entry.parts:
        shift = shift + (log_factors(part, u) / _LOG_2).round().view(part.shape)
    shift = shift.to(weight.device)
    limits, name = torch.finfo(weight.dtype), str(weight.dtype).removeprefix("torch.")
    top, bottom = math.frexp(limits.max)[1], math.frexp(limits.smallest_normal)[1]
    sizes = by_cells(weight, entry).abs()
    sizes = sizes.to(torch.promote_types(weight.dtype, torch.float32))
    high, low = int(_exponent(sizes.amax())), int(_exponent(_zero_as_inf(sizes).amin()))
    if (
        high + int(shift.max().clamp(min=0)) <= top
        and low + int(shift.min().clamp(max=0)) >= bottom
    ):
        return []
    axes = reduced_axes(entry)
    largest = sizes.amax(axes) if axes else sizes
    smallest = _zero_as_inf(sizes).amin(axes) if axes else _zero_as_inf(sizes)
    over = (shift > 0) & (_exponent(largest).view(entry.cells) + shift > top)
    under = (shift < 0) & (_exponent(smallest).view(entry.cells) + shift < bottom)
    found = [
        (1, f"a number would overflow in {name}", over),
        (-1, f"a number would fall below the normal range of {name}", under),
    ]
    return [item for item in found if bool(item[2].any())]


def _zero_as_inf(sizes: Tensor) -> Tensor:
    return torch.where(sizes == 0, math.inf, sizes)


def _exponent(sizes: Tensor) -> Tensor:
    """e of m * 2^e, 1/2 <= m < 1. Of zero the least there is, of inf the largest."""
    found = torch.frexp(sizes).exponent
    found = torch.where(sizes == 0, torch.iinfo(torch.int16).min, found)
    return torch.where(sizes == math.inf, torch.iinfo(torch.int16).max, found)


def _movers(entry: Entry, cells: Tensor, sign: int, u: Tensor) -> Tensor:
    """(num_scales + 1,) bool: scales that move one of the cells up (sign 1) or down (-1)."""
    out = torch.zeros_like(u, dtype=torch.bool)
    for part in entry.parts:
        axes = tuple(axis for axis in range(len(part.shape)) if axis not in part.axes)
        line = (cells.any(axes) if axes else cells).reshape(-1).to(u.device)
        for term in part.terms:
            ids = term.ids[line]
            out[ids[sign * term.coefficient * u[ids] > 0]] = True
    return out
