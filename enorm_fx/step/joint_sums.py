"""Sums over a group's channels, added up before they are reduced over processes.

Many weights touch one stream of a residual network. Where they lie in parts, what a channel needs
is the sum over all of them: each process adds up what it has of it, and one vector travels for each
side of a group, not one for each weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """values * exp(offset) is what this process has of a sum (or maximum), by position.

    offset: float64, the same in all processes. channels: of the group, by position. groups: the
    process groups that values are still to be reduced over; none where they are whole.
    """

    coefficient: float
    values: Tensor
    offset: Tensor
    channels: slice | Tensor
    groups: tuple[Any, ...]

    def logs(self) -> Tensor:
        """Of the sums, -inf where there is nothing."""
        # A denormal sum has no digits left: the unit counts as dead.
        tiny = torch.finfo(self.values.dtype).tiny
        values = torch.where(self.values < tiny, 0.0, self.values)
        return values.to(self.offset).log() + self.offset


def joined(sums: Sequence[Sums], channels: int, largest: bool) -> list[Sums]:
    """The same, with those that are to be reduced in one way added up, where that makes less of it.

    sums: of one group with so many channels. largest: they are maxima.
    """
    found = [one for one in sums if not one.groups]
    together: dict[Any, list[Sums]] = {}
    for one in sums:
        if one.groups:
            kind = one.coefficient, one.groups, one.values.dtype, one.values.device
            together.setdefault(kind, []).append(one)
    for members in together.values():
        less = sum(len(one.offset) for one in members) > channels
        found += [_total(members, channels, largest)] if less else members
    return found


def _total(sums: Sequence[Sums], channels: int, largest: bool) -> Sums:
    """One vector over all channels. Offsets become the largest of each channel: nothing overflows,
    and what falls below the smallest number is nothing beside what it would be added to."""
    first = sums[0]
    offset = first.offset.new_full((channels,), -math.inf)
    for one in sums:
        _scatter_(offset, one.channels, one.offset, largest=True)
    offset = torch.where(offset == -math.inf, 0.0, offset)
    total = torch.zeros_like(offset)
    for one in sums:
        share = one.values.to(offset) * (one.offset - offset[one.channels]).exp()
        _scatter_(total, one.channels, share, largest)
    return Sums(first.coefficient, total.to(first.values), offset, slice(0, channels), first.groups)


def _scatter_(total: Tensor, channels: slice | Tensor, values: Tensor, largest: bool) -> None:
    """total[channels] += values, or the maximum of both; channels may come more than once."""
    if isinstance(channels, slice):
        channels = torch.arange(len(total), device=total.device)[channels]
    if largest:
        total.scatter_reduce_(0, channels, values, "amax")
    else:
        total.index_add_(0, channels, values)
