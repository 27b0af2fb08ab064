"""The end of a generated step: every weight, bias and buffer times its factors, once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from enorm_fx.step.factors import Write
from enorm_fx.step.generated.cell_storage import Kind
from enorm_fx.step.generated.script import Result, Script
from enorm_fx.step.generated.state import State, joined
from enorm_fx.step.generated.tuning import Tuning
from enorm_fx.step.layout import CellTerm
from enorm_fx.step.matrix_view import make_view, memory_order
from enorm_fx.step.recipe import Recipe

_TOGETHER = 1 << 22  # entries whose factors are formed by one call, at most


@dataclass(slots=True, eq=False)
class _Vector:
    """Factors to be gathered, (size,): the product over `indices` of powers[index].

    indices: one tensor (size,) per term, into the flat powers. values: where they will be, once
    all vectors are known.
    """

    indices: tuple[Tensor, ...]
    values: Tensor = field(init=False)


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """A tensor seen as a matrix, to be multiplied by row and by column; None: not by this."""

    name: str
    matrix: Tensor
    rows: _Vector | None
    cols: _Vector | None

    @property
    def vectors(self) -> list[_Vector]:
        return [vector for vector in (self.rows, self.cols) if vector is not None]

    @property
    def half(self) -> bool:
        """Its factors are wider than itself."""
        return self.matrix.dtype.itemsize < 4


@dataclass(frozen=True, slots=True, eq=False)
class LineFactors:
    """Of a tensor in memory order: entry k takes rows[k // width] * cols[k % width]; None: ones."""

    width: int
    rows: Tensor | None
    cols: Tensor | None


class Multiply:
    """Writes the multiplications of a recipe, or what they multiply by."""

    def __init__(self, script: Script, recipe: Recipe, state: State, tuning: Tuning) -> None:
        self._script, self._recipe, self._state, self._tuning = script, recipe, state, tuning
        exponents = sorted({write.exponent for write in recipe.writes} - {0})
        coefficients = {
            t.coefficient for e in recipe.layout.entries for part in e.parts for t in part.terms
        }
        needed = {a * e for a in coefficients for e in exponents}
        # Rows 0 and 1 hold exp(u) and exp(-u), so one root call computes both.
        self._exponents = [1.0, -1.0, *sorted(needed - {1.0, -1.0})]
        self._in_order: list[_Target] = []
        self._rooms: dict[Kind, Tensor] = {}

    def write(self, ok: Result) -> None:
        """All calls. ok: 0-dim bool; where it is False every factor is one."""
        for members in self._prepared(ok):
            self._script.section(_title(members))
            self._multiply(members)

    def factors(self, ok: Result) -> list[LineFactors]:
        """The calls that make the factors alone, and by write where these will be.

        No tensor may be empty, have gaps in its memory, or take the power 0.
        """
        self._prepared(ok)
        found = []
        for target in self._in_order:
            rows, cols = (v if v is None else v.values for v in (target.rows, target.cols))
            found.append(LineFactors(target.matrix.shape[1], rows, cols))
        return found

    def _prepared(self, ok: Result) -> list[Sequence[_Target]]:
        """What is multiplied together, once the factors of all are made."""
        powers = self._powers(ok)
        targets: dict[Kind, list[_Target]] = defaultdict(list)
        for write in self._recipe.writes:
            if write.exponent and write.tensor.numel():
                dtype = torch.promote_types(write.tensor.dtype, torch.float32)
                self._in_order.append(self._target(write))
                targets[dtype, write.tensor.device].append(self._in_order[-1])
        found = []
        for kind, members in targets.items():
            families = self._families(members)
            self._script.section("factors of rows and columns")
            self._gather(powers, kind, families)
            found += families
        return found

    def _families(self, targets: Iterable[_Target]) -> list[Sequence[_Target]]:
        """Targets that are multiplied together."""
        families: dict[tuple[object, ...], list[_Target]] = defaultdict(list)
        for target in targets:
            matrix = target.matrix
            if self._listed(target):
                # One factor per entry apart: a list of these is one kernel on a CUDA device.
                whole = len(target.vectors[0].indices[0]) == matrix.numel()
                families[matrix.dtype, whole].append(target)
            elif matrix.numel() <= self._tuning.small:
                counts = tuple(len(vector.indices) for vector in target.vectors)
                families[matrix.dtype, matrix.shape, counts].append(target)
            else:
                families[id(target),].append(target)
        out: list[Sequence[_Target]] = []
        for members in families.values():
            most = max(1, _TOGETHER // members[0].matrix.numel())
            listed = self._listed(members[0])
            out += [members] if listed else [*_portions(members, most)]
        return out

    def _listed(self, target: _Target) -> bool:
        """Multiplied by rows or by columns only: nothing is gained by pieces."""
        small = target.matrix.numel() <= self._tuning.small
        return (small or not target.half) and len(target.vectors) == 1

    # ---- factors ----

    def _powers(self, ok: Result) -> Tensor:
        """exp(e * u) for each exponent e that is needed, (exponents, num_scales + 1)."""
        script, scales = self._script, self._state.scales
        script.section("factors; all of them one, unless everything is finite and in range")
        power = self._recipe.power
        kept = script.named(torch.empty_like(scales), "kept_scales")
        script.call(torch.where, ok, scales, script.number("one", 1.0, scales), out=kept)
        powers = scales.new_empty(len(self._exponents), scales.shape[1])
        script.named(powers, "powers")
        if self._recipe.exact:
            self._powers_of_two(kept, power, powers)
            return powers
        first = script.named(powers[:2], "factors")
        self._root(kept, 1 / power, first)
        for row, exponent in enumerate(self._exponents[2:], start=2):
            line = script.named(kept[int(exponent < 0)], "down" if exponent < 0 else "up")
            self._root(line, abs(exponent) / power, self._row(powers, row))
        return powers

    def _root(self, values: Tensor, exponent: float, out: Tensor) -> None:
        if exponent == 0.5:
            self._script.call(torch.sqrt, values, out=out)
        elif exponent == 1:
            self._script.call("copy_", out, values)
        else:
            self._script.call(torch.pow, values, exponent, out=out)

    def _powers_of_two(self, kept: Tensor, power: float, powers: Tensor) -> None:
        """The same by exponent bits: exact on every device. `ok` keeps them in range."""
        script = self._script
        up = script.named(kept[0], "up")
        logs = script.named(up.new_empty(up.shape, dtype=torch.float64), "log2_factors")
        bits = script.named(torch.empty_like(logs, dtype=torch.int64), "bits")
        script.call("copy_", logs, up)
        script.call("log2_", logs)
        script.call("mul_", logs, 1 / power)
        script.call("round_", logs)
        for row, exponent in enumerate(self._exponents):
            script.call("copy_", bits, logs)
            script.call("mul_", bits, int(exponent))
            script.call("add_", bits, 1023)
            script.call("bitwise_left_shift_", bits, 52)
            exactly = script.named(bits.view(torch.float64), "power_of_two")
            script.call("copy_", self._row(powers, row), exactly)

    def _row(self, powers: Tensor, row: int) -> Tensor:
        exponent = self._exponents[row]
        sign = "minus_" if exponent < 0 else ""
        return self._script.named(powers[row], f"factors_to_{sign}{abs(exponent):g}")

    def _gather(self, powers: Tensor, kind: Kind, families: Iterable[Sequence[_Target]]) -> None:
        """Fill the vectors of all targets by a few calls; those of a family lie in line."""
        script = self._script
        vectors = []
        for members in families:
            for side in ([m.rows for m in members], [m.cols for m in members]):
                vectors += [vector for vector in side if vector is not None]
        vectors.sort(key=lambda vector: -len(vector.indices))
        if not vectors:
            return
        flat = script.named(powers.view(-1), "powers_flat")
        if (powers.dtype, powers.device) != kind:
            converted = torch.empty_like(flat, dtype=kind[0], device=kind[1])
            script.named(converted, f"{script.name_of(flat)}_{str(kind[0])[6:]}")
            script.call("copy_", converted, flat)
            flat = converted
        sizes = [len(vector.indices[0]) for vector in vectors]
        table = script.named(flat.new_empty(sum(sizes)), "gathered")
        for vector, values in zip(vectors, table.split(sizes), strict=True):
            vector.values = values
        for rank in range(len(vectors[0].indices)):
            lines = [v.indices[rank] for v in vectors if len(v.indices) > rank]
            index = script.named(torch.cat(lines).to(kind[1]), f"positions_{rank}")
            head = script.named(table[: len(index)], "gathered_head")
            if rank == 0:
                script.call(torch.index_select, flat, 0, index, out=head)
            else:
                script.call("mul_", head, script.call(torch.index_select, flat, 0, index))

    # ---- tensors ----

    def _target(self, write: Write) -> _Target:
        entry, tensor = self._recipe.layout.entries[write.entry], write.tensor.detach()
        name = self._script.name_of(tensor)
        axes = memory_order(tensor)
        form = make_view(
            entry, axes or tuple(axis for axis, size in enumerate(tensor.shape) if size > 1)
        )
        rows, cols, run = form.rows, form.cols, form.run
        if axes is None:
            # Gaps in memory: no matrix; one factor for each entry.
            row = self._indices(form.row, write.exponent, cols * run)
            col = self._indices(form.col, write.exponent, run, rows)
            return _Target(name, tensor, None, _vector((*row, *col)))
        if rows == 1 and not form.row and run > 1:
            rows, cols, run = cols, run, 1
            form_row, form_col = form.col, form.row
        else:
            form_row, form_col = form.row, form.col
        matrix = tensor.as_strided((rows, cols * run), (cols * run, 1))
        return _Target(
            name,
            self._script.named(matrix, name),
            _vector(self._indices(form_row, write.exponent)),
            _vector(self._indices(form_col, write.exponent, run)),
        )

    def _indices(
        self, terms: Sequence[CellTerm], exponent: int, run: int = 1, times: int = 1
    ) -> tuple[Tensor, ...]:
        """Positions in the flat powers of each term; every one repeated `run` times, all of
        them `times`."""
        columns = self._state.scales.shape[1]
        out = []
        for term in terms:
            ids = torch.where(term.ids < 0, columns - 1, term.ids)
            ids = ids + self._exponents.index(term.coefficient * exponent) * columns
            out.append(ids.repeat_interleave(run).repeat(times))
        return tuple(out)

    # ---- multiplication ----

    def _multiply(self, members: Sequence[_Target]) -> None:
        """Write the calls for one family."""
        first, script = members[0], self._script
        if self._listed(first):
            factors = [script.named(_factors(m)[0], f"{m.name}_factors") for m in members]
            script.call(torch._foreach_mul_, [member.matrix for member in members], factors)
        elif len(members) > 1:
            self._multiply_alike(members)
        else:
            self._multiply_chunks(first)

    def _multiply_alike(self, members: Sequence[_Target]) -> None:
        """Matrices of one shape: all their factors by one call."""
        script, count = self._script, len(members)
        rows = joined([member.vectors[0].values for member in members])
        cols = joined([member.vectors[1].values for member in members])
        rows = script.named(rows.view(count, -1, 1), f"{members[0].name}_factors_of_rows")
        cols = script.named(cols.view(count, 1, -1), f"{members[0].name}_factors_of_columns")
        size = count * members[0].matrix.numel()
        room = self._room(rows, size).view(count, *members[0].matrix.shape)
        script.named(room, "factors_by_entry")
        script.call(torch.mul, rows, cols, out=room)
        factors = [
            script.named(factor, f"{member.name}_factors")
            for member, factor in zip(members, room, strict=True)
        ]
        script.call(torch._foreach_mul_, [member.matrix for member in members], factors)

    def _multiply_chunks(self, target: _Target) -> None:
        """By rows and columns in pieces of a cache's size, so that it is read from memory once."""
        script, matrix, factors = self._script, target.matrix, _factors(target)
        step = max(1, self._tuning.chunk // 2 // matrix[0].numel())
        pieces: list[tuple[Tensor, list[Tensor]]] = []
        for start in range(0, len(matrix), step):
            rows = slice(start, start + step)
            piece = script.named(matrix[rows], f"{target.name}_{start}")
            parts = [f[rows] if len(f) == len(matrix) else f for f in factors]
            for factor in parts:
                kind = "rows" if factor.shape[1:].numel() == 1 else "columns"
                script.named(factor, f"{target.name}_{kind}_{start}")
            pieces.append((piece, parts))
        if target.half:
            for piece, parts in pieces:
                # Rounded once. In place, torch would make a float32 copy of the whole tensor.
                wide = self._room(parts[0], piece.numel()).view(piece.shape)
                script.named(wide, "wide")
                script.call("copy_", wide, piece)
                for factor in parts:
                    script.call("mul_", wide, factor)
                script.call("copy_", piece, wide)
        else:
            # In order, piece by piece: a list of tensors of unequal shapes is a loop inside torch.
            tensors = [piece for piece, parts in pieces for _ in parts]
            values = [factor for _, parts in pieces for factor in parts]
            if len(pieces) == 1:
                for tensor, factor in zip(tensors, values, strict=True):
                    script.call("mul_", tensor, factor)
            else:
                script.call(torch._foreach_mul_, tensors, values)

    def _room(self, like: Tensor, size: int) -> Tensor:
        """Memory for factors, overwritten by its next user."""
        kind = like.dtype, like.device
        if kind not in self._rooms or len(self._rooms[kind]) < size:
            self._rooms[kind] = like.new_empty(size)
        return self._rooms[kind][:size]


def _factors(target: _Target) -> list[Tensor]:
    """What the matrix is multiplied by, each broadcastable against it."""
    out = []
    if target.rows is not None:
        out.append(target.rows.values.unsqueeze(1))
    if target.cols is not None:
        values, matrix = target.cols.values, target.matrix
        whole = len(values) == matrix.numel()
        out.append(values.view(matrix.shape) if whole else values.unsqueeze(0))
    return out


def _vector(indices: tuple[Tensor, ...]) -> _Vector | None:
    return _Vector(indices) if indices else None


def _portions(members: Sequence[_Target], most: int) -> Iterator[Sequence[_Target]]:
    return (members[start : start + most] for start in range(0, len(members), most))


def _title(members: Sequence[_Target]) -> str:
    more = len(members) - 1
    return f"multiply {members[0].name}" + (f" and {more} more" if more else "")
