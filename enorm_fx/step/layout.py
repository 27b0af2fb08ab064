"""What of a step is known before the weights: index maps, axes, who meets whom.

A weight is reduced to its cells: entries that take the same factor under every rescaling. An axis
of length n whose labels are constant along runs of length r gives n / r cells (r = n where
the factor does not vary, as along the kernel of a convolution; r = 49 where a linear layer
reads flattened 7 x 7 maps). Terms that vary along the same axes form a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from enorm_fx.plan.data import PlanData
from enorm_fx.plan.records import Group, ScaledParameter
from enorm_fx.step.order import batches
from enorm_fx.symmetry.solution import ScaleTerm

# Groups that take their steps from the same state, by turn.
Turns = tuple[tuple[Group, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class CellTerm:
    """coefficient * u[ids], ids flat over the axes of its part; -1 adds nothing."""

    coefficient: float
    ids: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Terms that vary along the same axes. shape: broadcasts against the cells."""

    axes: tuple[int, ...]
    shape: tuple[int, ...]
    terms: tuple[CellTerm, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A parameter that moves. cells[k] * runs[k] == shape[k]."""

    name: str
    shape: tuple[int, ...]
    cells: tuple[int, ...]
    runs: tuple[int, ...]
    counted: bool
    depth: int
    parts: tuple[Part, ...]

    @property
    def rate(self) -> float:
        """The most that log |w| changes by, in units of max |u|."""
        return sum(abs(term.coefficient) for part in self.parts for term in part.terms)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """CellStorage of a counted entry in which no scale occurs twice.

    Where two terms of a cell have the same scale (the diagonal of W in x + W x), the cell is
    taken out of the dense block (`removed`, flat cell numbers) and, unless nothing moves it,
    put into a block of its own (`picked`) whose terms are merged.
    """

    entry: int
    shape: tuple[int, ...]
    depth: int
    parts: tuple[Part, ...]
    picked: Tensor | None = None
    removed: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Touch:
    """Where a block meets a group: positions of a part's terms, and the channels they are."""

    block: int
    part: int
    coefficient: float
    positions: slice | Tensor
    channels: slice | Tensor


@dataclass(frozen=True, slots=True, eq=False)
class GroupLayout:
    """A group to be updated at once. Its steps are divided by `damping`.

    damping: the most of its scales that meet in one cell; 1 in the simultaneous order.
    """

    start: int
    channels: int
    damping: int
    touches: tuple[Touch, ...]
    positive: tuple[float, ...]
    negative: tuple[float, ...]

    @property
    def symmetric(self) -> bool:
        """One coefficient a and its opposite: J is symmetric about its minimum."""
        return len(self.positive) == 1 and self.positive == tuple(-a for a in self.negative)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """batches: numbers of groups that take their steps from the same state, by turn."""

    num_scales: int
    entries: tuple[Entry, ...]
    blocks: tuple[Block, ...]
    groups: tuple[GroupLayout, ...]
    batches: tuple[tuple[int, ...], ...]


def make_layout(
    plan: PlanData,
    active: Iterable[Group] | None,
    device: torch.device,
    order: str | Turns = "sequential",
) -> Layout:
    """Compile a plan for the given groups; scales of other groups count as pinned.

    active: None lets all scales move, and leaves blocks and groups empty: nothing to solve for.
    order: one of ORDERS, or the turns themselves, of active groups; those of a turn share no block.
    Index tensors lie on `device`. Parameters that nothing moves are left out.
    """
    owner = torch.full((plan.num_scales + 1,), -1, dtype=torch.int64)
    if active is None:
        owner[:-1] = 0
        return _on_device(Layout(plan.num_scales, _entries(plan, owner), (), (), ()), device)
    active = [group for group in active if group.channels]
    for number, group in enumerate(active):
        owner[group.start : group.start + group.channels] = number
    entries = _entries(plan, owner)
    blocks = tuple(
        block
        for number, entry in enumerate(entries)
        if entry.counted
        for block in _blocks(number, entry)
    )
    groups = _groups(active, blocks, owner)
    if order == "simultaneous":
        groups = tuple(replace(group, damping=1) for group in groups)
    if isinstance(order, str):
        turns = batches(order, _touched(groups))
    else:
        place = {group.start: k for k, group in enumerate(groups)}
        turns = tuple(tuple(place[g.start] for g in turn if g.channels) for turn in order)
    return _on_device(Layout(plan.num_scales, entries, blocks, groups, turns), device)


def alternating_turns(plan: PlanData, active: Iterable[Group]) -> Turns:
    """The groups that have a minimum to go to, by colour: those of a turn share no block."""
    active = [group for group in active if group.channels]
    found = make_layout(plan, active, torch.device("cpu")).groups
    pairs = [(g, f) for g, f in zip(active, found, strict=True) if f.positive and f.negative]
    turns = batches("alternating", _touched([layout for _, layout in pairs]))
    return tuple(tuple(pairs[number][0] for number in turn) for turn in turns)


def _touched(groups: Iterable[GroupLayout]) -> list[list[int]]:
    return [[touch.block for touch in group.touches] for group in groups]


def _entries(plan: PlanData, owner: Tensor) -> tuple[Entry, ...]:
    return tuple(e for s in plan.parameters if (e := _entry(s, owner)) is not None)


def _entry(scaled: ScaledParameter, owner: Tensor) -> Entry | None:
    if 0 in scaled.shape:
        return None
    terms = [t for term in scaled.terms if (t := _active(term, owner)) is not None]
    if not terms:
        return None
    runs = tuple(
        math.gcd(*(_run(t.index, axis, size) for t in terms))
        for axis, size in enumerate(scaled.shape)
    )
    cells = tuple(size // run for size, run in zip(scaled.shape, runs, strict=True))
    parts: dict[tuple[int, ...], list[CellTerm]] = {}
    for term in terms:
        index = term.index
        for axis, run in enumerate(runs):
            if index.shape[axis] > 1:
                index = index[(slice(None),) * axis + (slice(None, None, run),)]
        axes = tuple(axis for axis, size in enumerate(index.shape) if size > 1)
        parts.setdefault(axes, []).append(CellTerm(term.coefficient, index.reshape(-1)))
    return Entry(
        scaled.name,
        scaled.shape,
        cells,
        runs,
        scaled.counted,
        scaled.depth,
        tuple(Part(axes, _broadcast(axes, cells), tuple(t)) for axes, t in parts.items()),
    )


def _active(term: ScaleTerm, owner: Tensor) -> ScaleTerm | None:
    """The term with every scale pinned that no active group owns; None if nothing is left."""
    ids = term.index.cpu()
    ids = torch.where(owner[ids] >= 0, ids, -1)  # owner[-1] is -1: pinned stays pinned
    return ScaleTerm(term.coefficient, ids) if term.coefficient and bool((ids >= 0).any()) else None


def _run(index: Tensor, axis: int, size: int) -> int:
    """The longest run that divides the axis and along which the index never changes."""
    if index.shape[axis] == 1:
        return size
    lines = index.movedim(axis, 0).reshape(size, -1)
    changes = (lines[1:] != lines[:-1]).any(dim=1).nonzero().reshape(-1) + 1
    return math.gcd(size, *changes.tolist())


def _broadcast(axes: tuple[int, ...], cells: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size if axis in axes else 1 for axis, size in enumerate(cells))


def _blocks(number: int, entry: Entry) -> list[Block]:
    kept = [axis for axis, size in enumerate(entry.cells) if size > 1]
    shape = tuple(entry.cells[axis] for axis in kept)
    parts = tuple(
        Part(
            axes := tuple(kept.index(axis) for axis in part.axes),
            _broadcast(axes, shape),
            part.terms,
        )
        for part in entry.parts
    )
    repeated = _repeated(parts, shape)
    if repeated is None:
        return [Block(number, shape, entry.depth, parts)]
    dense = Block(number, shape, entry.depth, parts, removed=repeated)
    merged = _merge(parts, shape, repeated)
    if not merged:
        return [dense]
    line = Part((0,), tuple(repeated.shape), merged)
    return [dense, Block(number, tuple(repeated.shape), entry.depth, (line,), picked=repeated)]


def _repeated(parts: tuple[Part, ...], shape: tuple[int, ...]) -> Tensor | None:
    """Flat numbers of the cells in which a scale occurs twice, or None."""
    views = [t.ids.view(part.shape) for part in parts for t in part.terms]
    hit = None
    for k, first in enumerate(views):
        for second in views[:k]:
            if not bool(torch.isin(first[first >= 0], second).any()):
                continue
            equal = ((first == second) & (first >= 0)).expand(shape)
            hit = equal if hit is None else hit | equal
    if hit is None or not bool(hit.any()):
        return None
    return hit.reshape(-1).nonzero().reshape(-1)


def _merge(parts: tuple[Part, ...], shape: tuple[int, ...], cells: Tensor) -> tuple[CellTerm, ...]:
    """Terms of the given cells, each scale once, with its net coefficient."""
    ids, net = [], []
    for part in parts:
        for term in part.terms:
            ids.append(term.ids.view(part.shape).expand(shape).reshape(-1)[cells])
            net.append(torch.full(cells.shape, term.coefficient, dtype=torch.float64))
    for k in range(len(ids)):
        for j in range(k):
            same = (ids[k] == ids[j]) & (ids[k] >= 0)
            net[j] = net[j] + torch.where(same, net[k], 0.0)
            ids[k] = torch.where(same, -1, ids[k])
    merged = []
    for line, coefficients in zip(ids, net, strict=True):
        for coefficient in torch.unique(coefficients[line >= 0]).tolist():
            if coefficient:
                merged.append(CellTerm(coefficient, line.where(coefficients == coefficient, -1)))
    return tuple(merged)


def _groups(
    active: list[Group], blocks: tuple[Block, ...], owner: Tensor
) -> tuple[GroupLayout, ...]:
    touches: list[list[Touch]] = [[] for _ in active]
    meeting = [1] * len(active)
    for number, block in enumerate(blocks):
        for group, found in _touches(number, block, active, owner).items():
            touches[group] += found
            if len(found) > 1:
                meeting[group] = max(meeting[group], _meeting(block, active[group]))
    return tuple(
        GroupLayout(
            group.start,
            group.channels,
            met,
            tuple(found),
            tuple(sorted({t.coefficient for t in found if t.coefficient > 0})),
            tuple(sorted({t.coefficient for t in found if t.coefficient < 0})),
        )
        for group, found, met in zip(active, touches, meeting, strict=True)
    )


def _touches(
    number: int, block: Block, active: list[Group], owner: Tensor
) -> dict[int, list[Touch]]:
    found: dict[int, list[Touch]] = {}
    for part_number, part in enumerate(block.parts):
        for term in part.terms:
            owners = owner[term.ids]
            for group in torch.unique(owners[owners >= 0]).tolist():
                positions = (owners == group).nonzero().reshape(-1)
                channels = term.ids[positions] - active[group].start
                touch = Touch(
                    number, part_number, term.coefficient, _span(positions), _span(channels)
                )
                found.setdefault(group, []).append(touch)
    return found


def _span(numbers: Tensor) -> slice | Tensor:
    """A slice where the numbers count up by one: views instead of gathers."""
    first = first_of_run(numbers)
    return numbers if first is None else slice(first, first + len(numbers))


def first_of_run(numbers: Tensor) -> int | None:
    """The first of numbers that count up by one, from 0 or more; None if they do not."""
    first = int(numbers[0])
    run = torch.arange(first, first + len(numbers), device=numbers.device)
    return first if first >= 0 and torch.equal(numbers, run) else None


def _meeting(block: Block, group: Group) -> int:
    """The largest number of the group's scales that meet in one cell of the block."""
    count = torch.zeros(block.shape, dtype=torch.int16)
    for part in block.parts:
        for term in part.terms:
            inside = (term.ids >= group.start) & (term.ids < group.start + group.channels)
            count += inside.view(part.shape)
    if block.removed is not None:
        count.view(-1)[block.removed] = 0
    return max(1, int(count.max()))


def _on_device(layout: Layout, device: torch.device) -> Layout:
    return cast(Layout, _to(layout, device))


def _to(value: Any, device: torch.device) -> Any:
    """The same data with every tensor in it on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        moved = {f.name: _to(getattr(value, f.name), device) for f in fields(value)}
        return replace(value, **moved)
    return value
