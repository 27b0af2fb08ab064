"""Boxes: the entries of a tensor whose place along each axis is in a set of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

Places = Tensor | None  # (size of the axis,) bool; None: every place


@dataclass(frozen=True, slots=True, eq=False)
class Box:
    """One set of places for each axis; an entry is inside if its place along each axis is."""

    axes: tuple[Places, ...]

    @property
    def whole(self) -> bool:
        """Whether every entry is inside."""
        return all(places is None for places in self.axes)

    @property
    def empty(self) -> bool:
        """Whether no entry is inside."""
        return any(places is not None and not bool(places.any()) for places in self.axes)

    def __or__(self, other: Box) -> Box:
        """The smallest box around both."""
        if self.empty:
            return other
        if other.empty:
            return self
        return box(
            None if a is None or b is None else a | b
            for a, b in zip(self.axes, other.axes, strict=True)
        )

    def __and__(self, other: Box) -> Box:
        return Box(tuple(both(a, b) for a, b in zip(self.axes, other.axes, strict=True)))

    def spread(self, shape: Sequence[int], to: Sequence[int]) -> Box:
        """Of a tensor of this shape that is broadcast to another."""
        own = (None,) * (len(to) - len(shape)) + tuple(
            places if n == m else None
            for places, n, m in zip(self.axes, shape, to[len(to) - len(shape) :], strict=True)
        )
        return Box(own)

    def gathered(self, shape: Sequence[int], to: Sequence[int]) -> Box:
        """Of a result of shape `to`, as the operand of this shape that was broadcast to it sees
        it."""
        axes = self.axes[len(to) - len(shape) :]
        return Box(
            tuple(
                places if n == m else None
                for places, n, m in zip(axes, shape, to[len(to) - len(shape) :], strict=True)
            )
        )

    def pick(self, ids: Tensor) -> Tensor:
        """The ids of the entries inside; ids broadcast against the tensor."""
        for axis, places in enumerate(self.axes):
            if places is not None and ids.shape[axis] > 1:
                ids = ids.index_select(axis, places.nonzero().squeeze(1))
        return ids


def everything(shape: Sequence[int]) -> Box:
    """The box of all entries."""
    return Box((None,) * len(shape))


def box(axes: Iterable[Places]) -> Box:
    """A box whose sets are None where they hold every place."""
    return Box(tuple(None if p is None or bool(p.all()) else p for p in axes))


def both(a: Places, b: Places) -> Places:
    """The places that are in two sets."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def some(places: Places, groups: int) -> Places:
    """For each of so many groups of neighbours whether it has a place in the set."""
    return None if places is None else places.reshape(groups, -1).any(dim=1)


def each(places: Places, times: int) -> Places:
    """Every place as often, one after the other."""
    return None if places is None else places.repeat_interleave(times)


def along(places: Tensor, axis: int, ndim: int) -> Box:
    """The box of the places along one axis."""
    axes: list[Places] = [None] * ndim
    axes[axis] = places
    return box(axes)
