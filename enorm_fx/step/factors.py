"""Every tensor times its factors, in place: the one place that writes into a model.

Factors lie in one vector: the positions of every part of every entry, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from enorm_fx.step.descent import log_factors
from enorm_fx.step.layout import Entry, Part
from enorm_fx.step.measure import by_cells, cell_shape

_LOG_2 = math.log(2.0)
_CHUNK = 1 << 18  # entries whose factors are formed at a time
_NEAR = 1e-14  # of a multiple of log 2, where a log factor is taken for it


@dataclass(frozen=True, slots=True, eq=False)
class FactorTable:
    """parts: of all entries in order. spans: of each entry, (start, stop, view shape) by part."""

    parts: tuple[Part, ...]
    spans: tuple[tuple[tuple[int, int, tuple[int, ...]], ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """A tensor to be multiplied by the exponent-th power of its entry's factors."""

    entry: int
    tensor: Tensor
    exponent: int


@dataclass(frozen=True, slots=True, eq=False)
class FactoredWrite(Write):
    """Means of rows and of columns, whose product over their mean is to be multiplied.

    tensor: the rows', (..., n, 1); columns: (..., 1, m); of an entry (..., n, m) whose factors are
    each a row's or a column's.
    """

    columns: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """Factors of all parts, flat, by (exponent, dtype, device)."""

    by_kind: dict[tuple[int, torch.dtype, torch.device], Tensor]


def make_table(entries: Iterable[Entry]) -> FactorTable:
    parts: list[Part] = []
    spans, at = [], 0
    for entry in entries:
        own = []
        for part in entry.parts:
            size = math.prod(part.shape)
            own.append((at, at + size, cell_shape(entry, part.shape)))
            at += size
        parts += entry.parts
        spans.append(tuple(own))
    return FactorTable(tuple(parts), tuple(spans))


def make_factors(table: FactorTable, u: Tensor, writes: Iterable[Write], exact: bool) -> Factors:
    """The factors that the writes need. u: (num_scales + 1,) float64, the last one 0.

    exact: u holds multiples of log 2, and factors are powers of two to the last bit.
    """
    if not table.parts:
        return Factors({})
    logs = torch.cat([log_factors(part, u) for part in table.parts])
    by_kind: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
    for write in writes:
        kind = _kind(write)
        if kind not in by_kind:
            powers = write.exponent * logs
            factors = _exp2_exactly(powers) if exact else _exp(powers, u)
            by_kind[kind] = factors.to(kind[1]).to(kind[2])
    return Factors(by_kind)


def usable(factors: Factors, device: torch.device) -> Tensor:
    """0-dim bool: no factor has left its dtype's range."""
    good = [
        ((f >= torch.finfo(f.dtype).tiny) & (f < math.inf)).all().to(device)
        for f in factors.by_kind.values()
    ]
    return torch.stack(good).all() if good else torch.ones((), dtype=torch.bool, device=device)


def largest_after(
    write: Write, entry: Entry, table: FactorTable, factors: Factors, cells: Tensor
) -> Tensor:
    """max |w| after the write, 0-dim; inf where the factor of a cell leaves its dtype's range.

    cells: max |w| in every cell of the entry.
    """
    flat = factors.by_kind[_kind(write)].to(cells)
    vectors = [
        flat[start:stop].view(part.shape)
        for part, (start, stop, _) in zip(entry.parts, table.spans[write.entry], strict=True)
    ]
    factor = reduce(torch.mul, vectors)
    limits = torch.finfo(factor.dtype)
    good = (factor >= limits.tiny) & (factor <= limits.max)
    return torch.where(good, cells * factor, math.inf).amax()


def multiply_(
    writes: Sequence[Write], entries: Sequence[Entry], table: FactorTable, factors: Factors
) -> None:
    """tensor *= factors ** exponent, in place, without a copy of any tensor.

    Factors of rows and columns are multiplied first: one rounding, and nothing leaves the range of
    the dtype on its way to a number in it.
    """
    for write in writes:
        entry, spans = entries[write.entry], table.spans[write.entry]
        flat = factors.by_kind[_kind(write)]
        if isinstance(write, FactoredWrite):
            parts = [flat[start:stop].view(part.shape) for part, (start, stop, _) in
                     zip(entry.parts, spans, strict=True)]  # fmt: skip
            _multiply_moments_(write, entry, parts)
            continue
        vectors = [flat[start:stop].view(shape) for start, stop, shape in spans]
        target = by_cells(write.tensor, entry)
        if len(vectors) == 1 and flat.dtype == target.dtype:
            target.mul_(vectors[0])
            continue
        # A few rows at a time: torch multiplies half precision in wide copies.
        rows = max(1, _CHUNK * len(target) // target.numel())
        for start in range(0, len(target), rows):
            cut = slice(start, start + rows)
            target[cut].mul_(reduce(torch.mul, [v if len(v) == 1 else v[cut] for v in vectors]))


def separable(entry: Entry) -> bool:
    """Whether each factor is of rows or of columns of the last two axes, never of both."""
    return all(1 in part.shape[-2:] for part in entry.parts)


def _multiply_moments_(write: FactoredWrite, entry: Entry, parts: Sequence[Tensor]) -> None:
    """rows and columns become the means of v = rows * columns / mean(rows), times its factors.

    parts: factors, of shapes that broadcast against the entry's cells. With factors r of rows and
    c of columns:  rows * r * mean(columns * c) / mean(columns),  and  columns  likewise.
    """
    rows, columns = write.tensor, write.columns
    of_rows = _times(rows, entry, [f for f in parts if f.shape[-1] == 1], axis=-1)
    of_columns = _times(columns, entry, [f for f in parts if f.shape[-1] > 1], axis=-2)
    by_columns = _ratio(of_columns.mean(-1, keepdim=True), columns.to(of_columns).mean(-1, True))
    by_rows = _ratio(of_rows.mean(-2, keepdim=True), rows.to(of_rows).mean(-2, True))
    rows.copy_(of_rows * by_columns)
    columns.copy_(of_columns * by_rows)


def _times(tensor: Tensor, entry: Entry, parts: Sequence[Tensor], axis: int) -> Tensor:
    """A tensor that has 1 in place of one of the entry's axes, times factors that do too."""
    axis += len(entry.shape)

    def thin(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return (*sizes[:axis], 1, *sizes[axis + 1 :])

    thinned = replace(
        entry, shape=thin(entry.shape), cells=thin(entry.cells), runs=thin(entry.runs)
    )
    out = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    for factors in parts:
        by_cells(out, thinned).mul_(factors.view(cell_shape(thinned, tuple(factors.shape))))
    return out


def _ratio(after: Tensor, before: Tensor) -> Tensor:
    """How much a mean has grown; 1 where it was 0."""
    return torch.where(before == 0, 1.0, after / before)


def _kind(write: Write) -> tuple[int, torch.dtype, torch.device]:
    # Half precision weights take float32 factors: one rounding, not two.
    dtype = torch.promote_types(write.tensor.dtype, torch.float32)
    return write.exponent, dtype, write.tensor.device


def _exp(logs: Tensor, u: Tensor) -> Tensor:
    """exp(logs): a power of two, to the last bit, where log factors are multiples of log 2."""
    whole = (logs / _LOG_2).round() * _LOG_2
    near = (logs - whole).abs() <= _NEAR * (1 + u.abs().amax())
    return torch.where(near, _exp2_exactly(logs), logs.exp())


def _exp2_exactly(logs: Tensor) -> Tensor:
    """exp of multiples of log 2, by their exponent bits: exact on every device.

    Outside float64's normal range: 0 or inf, which `usable` refuses.
    """
    exponent = (logs / _LOG_2).round()
    bits = (exponent.clamp(-1022, 1023).to(torch.int64) + 1023) << 52
    power = bits.view(torch.float64)
    return torch.where(exponent > 1023, math.inf, torch.where(exponent < -1022, 0.0, power))
