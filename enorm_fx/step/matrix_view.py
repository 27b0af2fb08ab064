"""A tensor in memory, seen as a matrix of rows x cols x run.

Its factors vary by row and by column only; the `run` entries of a column take the same one: the
kernel of a convolution, the 7 x 7 maps that a linear layer reads flattened. Every dense tensor
has such a form, whatever its labels and its memory order: where a label varies along rows and
columns at once, all cells become columns of one row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from enorm_fx.step.layout import CellTerm, Entry, Part


@dataclass(frozen=True, slots=True, eq=False)
class MatrixView:
    """axes: those of more than one entry, in memory order. row, col: terms with ids of shape
    (rows,) and (cols,), -1 where nothing moves."""

    axes: tuple[int, ...]
    rows: int
    cols: int
    run: int
    row: tuple[CellTerm, ...]
    col: tuple[CellTerm, ...]


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Axes of more than one entry, slowest first; None where entries overlap or leave gaps."""
    axes = [axis for axis, size in enumerate(tensor.shape) if size > 1]
    axes.sort(key=tensor.stride, reverse=True)
    stride = 1
    for axis in reversed(axes):
        if tensor.stride(axis) != stride:
            return None
        stride *= tensor.shape[axis]
    return tuple(axes)


def make_view(entry: Entry, axes: tuple[int, ...]) -> MatrixView:
    """The form of a tensor of the entry's shape whose axes lie in memory in this order."""
    kept, repeats, sizes, run = _positions(entry, axes)
    if len(kept) == 1 and run > 1:
        # Rows of one factor each, rather than one row in which all factors are repeated.
        row = [_term(term, part, kept, repeats, sizes) for part, term in _terms(entry)]
        return MatrixView(axes, sizes[0], run, 1, tuple(row), ())
    split = _split(entry.parts, kept)
    rows, cols = [], []
    for part, term in _terms(entry):
        if split and part.axes and part.axes[0] in kept[:split]:
            rows.append(_term(term, part, kept[:split], repeats, sizes[:split]))
        else:
            cols.append(_term(term, part, kept[split:], repeats, sizes[split:]))
    return MatrixView(
        axes, math.prod(sizes[:split]), math.prod(sizes[split:]), run, tuple(rows), tuple(cols)
    )


def cell_numbers(entry: Entry, form: MatrixView) -> Tensor:
    """The flat number of the entry's cell at each position of (rows, cols), flat."""
    kept, repeats, sizes, run = _positions(entry, form.axes)
    numbers = CellTerm(1.0, torch.arange(math.prod(entry.cells)))
    every = Part(tuple(kept), entry.cells, (numbers,))
    found = _term(numbers, every, kept, repeats, sizes).ids
    return found if form.run == run else found.repeat_interleave(run)


def _positions(
    entry: Entry, axes: tuple[int, ...]
) -> tuple[list[int], dict[int, int], list[int], int]:
    """The axes that make rows and columns, how often each cell is repeated along them, their
    sizes then, and the run."""
    kept, run = list(axes), 1
    while kept and entry.cells[kept[-1]] == 1:
        run *= entry.shape[kept.pop()]
    # Runs along other axes than the last are written out, entry by entry.
    repeats = {axis: entry.runs[axis] for axis in kept}
    if kept:
        run *= repeats[kept[-1]]
        repeats[kept[-1]] = 1
    return kept, repeats, [entry.cells[axis] * repeats[axis] for axis in kept], run


def _terms(entry: Entry) -> Iterator[tuple[Part, CellTerm]]:
    return ((part, term) for part in entry.parts for term in part.terms)


def _split(parts: Sequence[Part], kept: list[int]) -> int:
    """How many leading axes make the rows: the fewest that no part straddles; 0 if none do."""
    for split in range(1, len(kept)):
        leading = set(kept[:split])
        if all(leading.issuperset(p.axes) or leading.isdisjoint(p.axes) for p in parts if p.axes):
            return split
    return 0


def _term(
    term: CellTerm, part: Part, kept: list[int], repeats: dict[int, int], sizes: list[int]
) -> CellTerm:
    """The term along the kept axes, in their order; it does not vary along the others."""
    ids = term.ids.view(part.shape)
    for axis in part.axes:
        ids = ids.repeat_interleave(repeats[axis], dim=axis)
    rest = [axis for axis in range(ids.dim()) if axis not in kept]
    ids = ids.permute(*kept, *rest).reshape([ids.shape[axis] for axis in kept])
    return CellTerm(term.coefficient, ids.expand(sizes).reshape(-1))
