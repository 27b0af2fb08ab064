"""Measure: one reduction per weight, from entries to cells.

S[cell] = sum of |w|^p over the entries of the cell, or max |w| for p = inf. Nothing is written but
the workspace that is handed in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from enorm_fx.plan.data import PlanData
from enorm_fx.step.checks import check_settings, find_held
from enorm_fx.step.layout import Block, Entry
from enorm_fx.step.shards import local, reduce_, shard_of

_SHORT = 32  # entries of a row, below which vector_norm spends its time between rows
_CHUNK = 1 << 18  # entries of the buffer


def objective(plan: PlanData, p: float = 2, c: float = 1.0) -> float:
    """J at u = 0: sum over counted parameters of c^(-p * depth) * sum |w|^p.

    For p = inf: the maximum of c^-depth * max |w|. Computed in float64; inf or NaN if a weight is.
    """
    check_settings({"p": p, "c": c})
    p = float(p)
    found: list[tuple[int, Tensor]] = []  # depth, and the weight's part of J
    in_parts = []
    with torch.no_grad():
        for scaled in plan.parameters:
            if not scaled.counted or 0 in scaled.shape:
                continue
            weight = find_held(plan.model, scaled.name)
            held, shard = local(weight), shard_of(weight, scaled.name)
            measured = (
                total_of(held, p, torch.float64) if held.numel() else torch.zeros(()).double()
            )
            found.append((scaled.depth, measured))
            if shard is not None:
                in_parts.append((shard.groups, measured))
        reduce_(in_parts, math.isinf(p))
    total = 0.0
    for depth, measured in found:
        # The comparison lets NaN through, in whatever order.
        if math.isinf(p):
            norm = float(measured) * c**-depth
            total = total if total >= norm or math.isnan(total) else norm
        else:
            total += float(measured) * c ** (-p * depth)
    return total


def accumulation_dtype(dtype: torch.dtype, p: float, wide: bool) -> torch.dtype:
    """float32 or wider. float64 where p-th powers could leave float32's range (1e-5^10)."""
    if wide or p not in (1.0, 2.0, math.inf):
        return torch.float64
    return torch.promote_types(dtype, torch.float32)


def by_cells(tensor: Tensor, entry: Entry) -> Tensor:
    """View with an extra axis behind each axis that is cut into runs.

    (n, ...) -> (n / run, run, ...) where 1 < run < n; other axes stay.
    """
    for axis in reversed(range(len(entry.shape))):
        if 1 < entry.runs[axis] < entry.shape[axis]:
            tensor = torch.unflatten(tensor, axis, (entry.cells[axis], entry.runs[axis]))
    return tensor


def cell_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (n or 1 per axis of the cells) that broadcasts against `by_cells`."""
    out: list[int] = []
    for axis, size in enumerate(shape):
        out.append(size)
        if 1 < entry.runs[axis] < entry.shape[axis]:
            out.append(1)
    return tuple(out)


def measure_(weight: Tensor, entry: Entry, p: float, out: Tensor) -> None:
    """out[cell] = sum |w|^p (p < inf) or max |w|, out of shape entry.cells and a wide dtype."""
    view = by_cells(weight, entry)
    reduced = reduced_axes(entry)
    if not reduced:
        # Half precision is widened before it is squared; a copy into `out` allocates nothing.
        out.copy_(weight)
        _power_(out, p)
        return
    out.copy_(_sums(view, reduced, p, out.dtype).view(entry.cells))


def total_of(tensor: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """sum |w|^p (p = inf: max |w|) over all entries, 0-dim, computed in the given dtype."""
    if not tensor.is_contiguous() or tensor.dtype == dtype or tensor.device.type != "cpu":
        norm: Tensor = torch.linalg.vector_norm(tensor, p, dtype=dtype)
        return norm if p in (1.0, math.inf) else norm.pow_(p)
    # vector_norm would make a wide copy of all of it first.
    parts = [torch.zeros((), dtype=dtype)]
    for piece in tensor.view(-1).split(_CHUNK):
        powers = piece.to(dtype)
        _power_(powers, p)
        parts.append(powers.amax() if math.isinf(p) else powers.sum())
    totals = torch.stack(parts)
    return totals.amax() if math.isinf(p) else totals.sum()


def _sums(view: Tensor, reduced: tuple[int, ...], p: float, dtype: torch.dtype) -> Tensor:
    """Sums of powers (or maxima) over the given axes, in the fastest order there is."""
    leading = tuple(k for k, axis in enumerate(reduced) if axis == k)
    if leading and len(leading) < len(reduced):
        # Sums of whole rows first: what is left for the slow inner axes is small.
        rows = _sums(view, leading, p, dtype)
        rest = tuple(axis - len(leading) for axis in reduced[len(leading) :])
        return rows.amax(rest) if math.isinf(p) else rows.sum(rest)
    size = math.prod(view.shape[axis] for axis in reduced)
    if view.is_contiguous() and view.device.type == "cpu":
        # vector_norm takes 3 to 20 times as long on short rows and on columns, and copies all of a
        # tensor of another type first; else nobody beats it on long rows.
        if leading:
            kept = view.shape[len(leading) :]
            return _by_chunks(view.reshape(size, -1), p, dtype, over_rows=True).view(kept)
        inner = reduced == tuple(range(view.dim() - len(reduced), view.dim()))
        if inner and (size < _SHORT or view.dtype != dtype):
            rows = _by_chunks(view.view(-1, size), p, dtype, over_rows=False)
            return rows.view(view.shape[: view.dim() - len(reduced)])
    norm: Tensor = torch.linalg.vector_norm(view, p, dim=reduced, dtype=dtype)
    return norm if p in (1.0, math.inf) else norm.pow_(p)


def _by_chunks(matrix: Tensor, p: float, dtype: torch.dtype, over_rows: bool) -> Tensor:
    """Sums of powers (or maxima) over the rows or along each row, through a small buffer."""
    count, size = matrix.shape
    rows = min(count, max(1, _CHUNK // size))
    buffer = torch.empty((rows, size), dtype=dtype, device=matrix.device)
    out = torch.zeros(size if over_rows else count, dtype=dtype, device=matrix.device)
    ones = torch.ones(size, dtype=dtype, device=matrix.device)
    for start in range(0, count, rows):
        chunk = matrix[start : start + rows]
        powers = buffer[: len(chunk)].copy_(chunk)
        _power_(powers, p)
        if over_rows and math.isinf(p):
            torch.maximum(out, powers.amax(0), out=out)
        elif over_rows:
            out += powers.sum(0)
        elif math.isinf(p):
            torch.amax(powers, 1, out=out[start : start + rows])
        else:
            torch.mv(powers, ones, out=out[start : start + rows])
    return out


def max_abs(weight: Tensor) -> Tensor:
    """max |w| as a 0-dim tensor, float32 or wider; NaN and inf come through."""
    return total_of(weight, math.inf, torch.promote_types(weight.dtype, torch.float32))


def block_values(block: Block, cells: Tensor) -> Tensor:
    """The values of a block, a view of the measured cells where it has them all.

    Must be called for the picked block of an entry before its dense one is cleared by
    `clear_removed_`.
    """
    if block.picked is not None:
        return cells.reshape(-1)[block.picked]
    return cells.view(block.shape)


def clear_removed_(block: Block, cells: Tensor) -> None:
    """CellStorage of another block, or that nothing moves, count as zero here."""
    if block.removed is not None:
        cells.view(-1).index_fill_(0, block.removed, 0.0)


def _power_(out: Tensor, p: float) -> None:
    if p == 2.0:
        out.square_()
        return
    out.abs_()
    if p not in (1.0, math.inf):
        out.pow_(p)


def reduced_axes(entry: Entry) -> tuple[int, ...]:
    """Axes of `by_cells` that are summed over."""
    axes, at = [], 0
    for cells, run in zip(entry.cells, entry.runs, strict=True):
        if run > 1:
            axes.append(at if cells == 1 else at + 1)
        at += 2 if cells > 1 and run > 1 else 1
    return tuple(axes)
