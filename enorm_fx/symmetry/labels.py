"""Labels: how each entry of a tensor scales, as sums of unknown log scales.

A label is a sum of terms; a term is an integer coefficient and an array of variable ids that
broadcasts against the tensor's shape (size 1 where the scale does not vary). An entry of the
tensor is multiplied by exp(sum of coefficient * variable). No terms: the entry is a number that
stays as it is. A label with `wild` belongs to a tensor of zeros, which every label fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Ids = Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LabelTerm:
    """coefficient * u[ids]; ids is int64 with one axis per axis of the tensor."""

    coefficient: int
    ids: Ids


@dataclass(frozen=True, slots=True, eq=False)
class Label:
    """The label of a tensor of this shape."""

    shape: tuple[int, ...]
    terms: tuple[LabelTerm, ...] = ()
    wild: bool = False
    node: int = -1  # index of the trace's node, where the tensor comes straight from one

    def __neg__(self) -> Label:
        return self.times(-1)

    def times(self, factor: int) -> Label:
        """The label of the tensor raised to an integer power."""
        terms = tuple(LabelTerm(t.coefficient * factor, t.ids) for t in self.terms)
        return Label(self.shape, terms)

    def map(self, shape: Sequence[int], change: Callable[[Ids], Ids]) -> Label:
        """The label of a tensor whose ids follow from this one's by a shape operation."""
        terms = tuple(LabelTerm(t.coefficient, change(t.ids)) for t in self.terms)
        return Label(tuple(shape), terms, self.wild)

    def varies(self, axis: int) -> bool:
        """Whether some term's ids differ along an axis."""
        return any(t.ids.shape[axis] > 1 for t in self.terms)


def combine(terms: Iterable[LabelTerm]) -> tuple[LabelTerm, ...]:
    """Add up terms that have the same ids; drop those that cancel."""
    kept: list[LabelTerm] = []
    for term in terms:
        for i, other in enumerate(kept):
            if _same_ids(term.ids, other.ids):
                kept[i] = LabelTerm(other.coefficient + term.coefficient, other.ids)
                break
        else:
            kept.append(term)
    return tuple(t for t in kept if t.coefficient)


def _same_ids(a: Ids, b: Ids) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def add(shape: Sequence[int], *labels: Label) -> Label:
    """The label of a product of tensors that broadcast to this shape."""
    ndim = len(shape)
    terms = [LabelTerm(t.coefficient, expand_dims(t.ids, ndim)) for x in labels for t in x.terms]
    return Label(tuple(shape), combine(terms), any(x.wild for x in labels))


def expand_dims(ids: Ids, ndim: int) -> Ids:
    """Axes of size 1 in front until there are ndim, as broadcasting adds them."""
    return ids.reshape((1,) * (ndim - ids.ndim) + tuple(ids.shape))


def squeeze_constant(ids: Ids) -> Ids:
    """Size 1 on every axis along which the ids do not change."""
    for axis in range(ids.ndim):
        if ids.shape[axis] > 1:
            first = ids.narrow(axis, 0, 1)
            if bool((ids == first).all()):
                ids = first
    return ids


@dataclass(frozen=True, slots=True, eq=False)
class Equations:
    """Rows sum_k weights[k, row] * variable[ids[k, row]] = 0, all of one origin.

    weights, ids: int64 of shape (terms, rows); origin: an index that the caller chose.
    """

    weights: Tensor
    ids: Tensor
    origin: int


class System:
    """The variables made so far and the equations between them.

    origin: what the rules that run now are about (an index that the caller chooses); it is
    kept with every equation so that a pinned weight can be explained.
    """

    def __init__(self) -> None:
        self.size = 0
        self.equations: list[Equations] = []
        self.origin = 0
        self.nil = self.fresh(1)  # a variable that is zero, to fill up arrays of ids
        self.zero([LabelTerm(1, self.nil)])

    def fresh(self, *shape: int) -> Ids:
        """Ids of new variables, as an array of the given shape."""
        count = torch.Size(shape).numel()
        ids = torch.arange(self.size, self.size + count).reshape(shape)
        self.size += count
        return ids

    def scalar(self, ndim: int) -> Ids:
        """One new variable for a whole tensor."""
        return self.fresh(*(1,) * ndim)

    def zero(self, terms: Iterable[LabelTerm]) -> None:
        """Require that the terms add up to zero wherever they are broadcast to.

        Terms that vary along separate axes are separated first (f(i) + g(j) = 0 for all i, j
        says that both are constant), so that an equation of a large matrix stays small.
        """
        terms = combine(terms)
        if not terms:
            return
        blocks = term_blocks(terms)
        link: list[LabelTerm] = []
        for block in blocks[1:]:
            scale = self.scalar(block[0].ids.ndim)
            self._append([*block, LabelTerm(-1, scale)])
            link.append(LabelTerm(1, scale))
        self._append([*blocks[0], *link])

    def _append(self, terms: Sequence[LabelTerm]) -> None:
        ids = torch.broadcast_tensors(*distinct([t.ids for t in terms]))
        rows = torch.stack([i.reshape(-1) for i in ids])
        weights = torch.tensor([t.coefficient for t in terms]).unsqueeze(1).expand_as(rows)
        self.equations.append(Equations(weights, rows, self.origin))

    def equal(self, a: Label, b: Label) -> None:
        """Require that two tensors that broadcast against each other scale alike."""
        if a.wild or b.wild:
            return
        ndim = max(len(a.shape), len(b.shape))
        left = [LabelTerm(t.coefficient, expand_dims(t.ids, ndim)) for t in a.terms]
        right = [LabelTerm(-t.coefficient, expand_dims(t.ids, ndim)) for t in b.terms]
        self.zero([*left, *right])

    def pin(self, label: Label) -> None:
        """Require that the tensor keeps its values."""
        self.zero(label.terms)

    def uniform(self, label: Label, axes: Iterable[int]) -> Label:
        """Require that the label does not vary along the axes; its ids have size 1 there after."""
        axes = [axis for axis in axes if label.varies(axis)]
        if not axes:
            return label
        moving = [t for t in label.terms if any(t.ids.shape[a] > 1 for a in axes)]
        still = [t for t in label.terms if all(t.ids.shape[a] == 1 for a in axes)]
        shape = list(torch.broadcast_shapes(*(t.ids.shape for t in moving)))
        for axis in axes:
            shape[axis] = 1
        common = self.fresh(*shape)
        self.zero([*moving, LabelTerm(-1, common)])
        return Label(label.shape, (*still, LabelTerm(1, common)), label.wild)


def end_to_end(arrays: Iterable[Ids]) -> Iterator[tuple[Ids, Tensor]]:
    """Arrays of ids after one another, about a million ids at a time.

    With every id the number of the array that it comes from, both int64 of shape (n,): what is
    asked of a thousand short arrays is asked once.
    """
    waiting: list[Ids] = []
    begin = total = 0
    for array in arrays:
        waiting.append(array.reshape(-1))
        total += array.numel()
        if total >= _MANY_IDS:
            yield _numbered(waiting, begin)
            begin, total, waiting = begin + len(waiting), 0, []
    if waiting:
        yield _numbered(waiting, begin)


def _numbered(arrays: list[Ids], begin: int) -> tuple[Ids, Tensor]:
    counts = torch.tensor([len(array) for array in arrays])
    owner = torch.arange(begin, begin + len(arrays)).repeat_interleave(counts)
    return torch.cat(arrays), owner


def numbers_of(table: Tensor, arrays: Sequence[Ids]) -> list[list[int]]:
    """For each array of ids the numbers that a table has for them, each once, in order.

    Numbers below zero are left out. The table's last entry stands for an id of -1.
    """
    span = int(table.max()) + 1
    found: list[list[int]] = [[] for _ in arrays]
    for ids, owner in end_to_end(arrays):
        number = table[ids]
        keys = (owner * span + number)[number >= 0].unique_consecutive().unique()
        for key in keys.tolist():
            found[key // span].append(key % span)
    return found


_MANY_IDS = 1 << 20
_FEW_ROWS = 2048


def distinct(ids: list[Ids]) -> list[Ids]:
    """Drop repeated slices along each axis: a token beside 196 alike patches makes two rows.

    Slices are told apart by a hash; what it takes for equal is compared before anything is dropped.
    Small arrays are left as they are.
    """
    shape = ids[0].shape if len(ids) == 1 else torch.broadcast_shapes(*(i.shape for i in ids))
    if shape.numel() <= _FEW_ROWS or shape.numel() == max(shape):
        return ids  # few rows, or one axis, along which little is repeated
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        varying = [i for i in ids if i.shape[axis] > 1]
        _, inverse = _slice_hashes(varying, axis).unique(return_inverse=True)
        count = int(inverse.max()) + 1
        if count == size:
            continue
        first = torch.full((count,), size).scatter_reduce_(0, inverse, torch.arange(size), "amin")
        like = first[inverse]  # for each slice the one that it is dropped for
        if all(torch.equal(i, i.index_select(axis, like)) for i in varying):
            ids = [i.index_select(axis, first) if i.shape[axis] > 1 else i for i in ids]
    return ids


def _slice_hashes(ids: list[Ids], axis: int) -> Tensor:
    """A 64-bit number for each slice along an axis; equal slices of all arrays have equal ones."""
    size = ids[0].shape[axis]
    key = torch.zeros(size, dtype=torch.int64)
    for i in ids:
        slices = i.movedim(axis, 0).reshape(size, -1)
        key = key * _MIX + (slices * _multipliers(slices.shape[1])).sum(dim=1)
    return key


_MIX = 0x9E3779B97F4A7C15 - (1 << 64)


def _multipliers(count: int) -> Tensor:
    """Fixed odd pseudo-random 64-bit numbers."""
    x = (torch.arange(count) + 1) * _MIX
    x = (x ^ (x >> 31)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    return (x ^ (x >> 27)) | 1


def term_blocks(terms: Sequence[LabelTerm]) -> list[list[LabelTerm]]:
    """Terms that share an axis along which they vary belong together; constants go first."""
    blocks: list[tuple[set[int], list[LabelTerm]]] = []
    constant: list[LabelTerm] = []
    for term in terms:
        axes = {a for a, n in enumerate(term.ids.shape) if n > 1}
        if not axes:
            constant.append(term)
            continue
        members = [term]
        for other in [b for b in blocks if b[0] & axes]:
            blocks.remove(other)
            axes |= other[0]
            members = other[1] + members
        blocks.append((axes, members))
    if not blocks:
        return [constant]
    first, *rest = [block for _, block in blocks]
    return [constant + first, *rest]
