"""Marginals in a generated step: sums of cells times the factors of all scales but one.

The common one, a `Product`, is a matrix times a vector; those of many groups may be one call. All
others (labels along several axes, gathered channels, several terms) are written step by step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from enorm_fx.step.generated.cell_storage import CellStorage
from enorm_fx.step.generated.contraction import Contraction
from enorm_fx.step.generated.script import Script
from enorm_fx.step.generated.state import State, offset_of, strided
from enorm_fx.step.generated.terms import Terms
from enorm_fx.step.layout import Block, CellTerm, GroupLayout, Part, Touch, first_of_run
from enorm_fx.step.recipe import Recipe


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A touch whose marginal is a matrix of cells, (channels, length), times a vector of factors.

    offset, strides: of the matrix in the block's values. over_rows: it is a transpose.
    factors: (row of the scales, first scale), or None where they are all one.
    share: c^(-p * depth), relative to the group's other touches.
    """

    block: int
    offset: int
    length: int
    strides: tuple[int, int]
    over_rows: bool
    factors: tuple[int, int] | None
    coefficient: float
    share: float


class Marginals:
    """Writes the marginals of touches into the sums of their groups."""

    def __init__(self, script: Script, recipe: Recipe, state: State, cells: CellStorage) -> None:
        self._script, self._recipe, self._state, self._cells = script, recipe, state, cells
        self._largest = math.isinf(recipe.p)
        self._terms = Terms(script, state)
        self._contraction = Contraction(script, cells, self._largest)
        self._summed: set[int] = set()
        self._before: frozenset[int] = frozenset()
        self._written: set[tuple[int, float]] = set()
        self._sums = self._allocate()

    def begin(self) -> None:
        """A batch: its groups take their marginals from the scales as they are now."""
        self._written.clear()
        self._before = frozenset(self._summed)

    def moved(self, group: GroupLayout) -> None:
        """From now on the group's scales are not known to be one."""
        self._terms.moved(group)

    def sums(self, groups: Sequence[int], coefficient: float) -> Tensor:
        """M_a of the groups, (channels,) or (groups, channels)."""
        starts = [offset_of(self._sums[group, coefficient]) for group in groups]
        channels = self._recipe.layout.groups[groups[0]].channels
        view = strided(self._state.sums, starts, (channels,), (1,))
        side = "incoming" if coefficient > 0 else "outgoing"
        size = "" if abs(coefficient) == 1 else f"_{abs(coefficient):g}"
        return self._script.named(view, f"{side}{size}_{groups[0]}")

    def share(self, group: GroupLayout, touch: Touch) -> float:
        """c^(-p * depth) of the touched block, as a part of the group's largest."""
        blocks = self._recipe.layout.blocks
        rate = -self._recipe.power * math.log(self._recipe.c)
        nearest = max(rate * blocks[t.block].depth for t in group.touches)
        return math.exp(rate * blocks[touch.block].depth - nearest)

    def check_rest(self) -> None:
        """Sums of the blocks that no marginal has been taken of."""
        for number, block in enumerate(self._recipe.layout.blocks):
            if number not in self._summed:
                name = self._recipe.layout.entries[block.entry].name
                self._script.section(f"{name}: nothing to balance; is it finite?")
                for _, values in self._cells.pieces(number):
                    total = self._script.named(self._state.take(1).view(()), f"{name}_total")
                    self._script.call("copy_", total, self._script.call(torch.sum, values))

    # ---- a matrix times a vector ----

    def as_products(self, group: GroupLayout) -> tuple[Product, ...] | None:
        """All touches of a group, if they are of the common kind."""
        products = [self._as_product(group, touch) for touch in group.touches]
        found = tuple(product for product in products if product is not None)
        return found if len(found) == len(products) else None

    def places(self, number: int, products: Sequence[Product]) -> tuple[int, ...]:
        """Where the numbers lie that the products of a group read and write."""
        places = []
        for product in products:
            values = self._cells.stored(product.block)
            places.append(offset_of(self._sums[number, product.coefficient]))
            places.append(0 if values is None else offset_of(values) + product.offset)
            places.append(product.factors[1] if product.factors else 0)
        return tuple(places)

    def _as_product(self, group: GroupLayout, touch: Touch) -> Product | None:
        block = self._recipe.layout.blocks[touch.block]
        part, matrix = block.parts[touch.part], _matrix(block, touch.part)
        covered, at = touch.channels, touch.positions
        if matrix is None or not (isinstance(covered, slice) and isinstance(at, slice)):
            return None
        if covered != slice(0, group.channels) or len(part.terms) > 1 or self._foreign(touch.block):
            return None
        whole = at == slice(0, math.prod(part.shape))
        if not whole and (touch.block not in self._before or self._cells.streamed(touch.block)):
            return None
        others = [term for p in block.parts if p is not part for term in p.terms]
        rest = [term for term in others if self._terms.moves(term)]
        first = first_of_run(rest[0].ids) if rest else None
        if rest and (len(rest) > 1 or first is None or abs(rest[0].coefficient) != 1):
            return None
        rows, cols, over_rows = matrix
        return Product(
            touch.block,
            at.start if over_rows else at.start * cols,
            rows if over_rows else cols,
            (1, cols) if over_rows else (cols, 1),
            over_rows,
            None if first is None else (int(rest[0].coefficient < 0), first),
            touch.coefficient,
            self.share(group, touch),
        )

    def multiply(self, groups: Sequence[int], products: Sequence[Product]) -> None:
        """One product of each group, all of one structure and at even distances."""
        one, channels = products[0], self._recipe.layout.groups[groups[0]].channels
        self._summed.update(product.block for product in products)
        out, add = self.sums(groups, one.coefficient), self._extends(groups[0], one.coefficient)
        factors = None
        if one.factors:
            row = self._state.scales[one.factors[0]]
            starts = [offset_of(row) + p.factors[1] for p in products if p.factors]
            factors = strided(row, starts, (one.length,), (1,))
            self._script.named(factors, f"{'down' if one.factors[0] else 'up'}_{one.factors[1]}")
        for start, values in self._cells.pieces(one.block):
            if self._cells.streamed(one.block):
                self._contraction.multiply_rows(
                    one.block, one.over_rows, start, values, factors, out, add, one.share
                )
                continue
            starts = [offset_of(values) + one.offset]
            for product in products[1:]:
                other = self._cells.stored(product.block)
                assert other is not None  # only stored cells are taken together
                starts.append(offset_of(other) + product.offset)
            matrix = strided(values, starts, (channels, one.length), one.strides)
            self._script.named(matrix, f"{self._script.name_of(values)}{'_t' * one.over_rows}")
            self._contraction.accumulate(one.block, matrix, factors, out, add, one.share)

    # ---- anything else ----

    def collect(self, number: int, touch: Touch) -> None:
        """The marginal of one touch of any kind."""
        group, script = self._recipe.layout.groups[number], self._script
        part = self._recipe.layout.blocks[touch.block].parts[touch.part]
        self._terms.begin()
        add = self._extends(number, touch.coefficient)
        out = self.sums((number,), touch.coefficient)
        found = self._whole(touch.block, touch.part)
        for term in part.terms:
            if not _is_own(term, touch, group) and self._terms.moves(term):
                product = self._terms.temporary(found.shape, found)
                script.call(torch.mul, found, self._terms.factor(term, found), out=product)
                found = product
        at, channels = touch.positions, touch.channels
        if isinstance(at, Tensor):
            chosen = self._terms.temporary(at.shape, found)
            script.call(torch.index_select, found, 0, self._terms.index(at), out=chosen)
            found = chosen
        elif at != slice(0, len(found)):
            found = script.named(found[at], f"{script.name_of(found)}_{at.start}")
        share = self.share(group, touch)
        if channels == slice(0, group.channels):
            self._contraction.add_(out, found, add, share)
            return
        if not add:
            script.call("zero_", out)
        if isinstance(channels, slice):
            part_of_out = script.named(out[channels], f"{script.name_of(out)}_{channels.start}")
            self._contraction.add_(part_of_out, found, True, share)
        elif self._largest:
            scaled = self._terms.temporary(found.shape, found)
            script.call(torch.mul, found, share, out=scaled)
            script.call("scatter_reduce_", out, 0, self._terms.index(channels), scaled, "amax")
        else:
            script.call("index_add_", out, 0, self._terms.index(channels), found, alpha=share)

    def _whole(self, number: int, part_number: int) -> Tensor:
        """Marginals at all positions of a part, flat, without the part's own factors."""
        block, script = self._recipe.layout.blocks[number], self._script
        target, size = block.parts[part_number], math.prod(block.parts[part_number].shape)
        if number in self._before:
            out = self._terms.temporary((size,), self._state.sums)
        else:
            out = script.named(self._state.take(size), f"{self._name(number)}_marginal")
        self._summed.add(number)
        like = self._cells.like(number)
        local = self._terms.temporary((size,), like) if self._foreign(number) else out
        rest = [part for part in block.parts if part is not target]
        factors = [(part, f) for part in rest if (f := self._terms.product(part, like)) is not None]
        matrix = _matrix(block, part_number)
        for start, values in self._cells.pieces(number):
            if matrix is None:
                self._sum_cells(number, target, values, factors, local)
                continue
            _, cols, over_rows = matrix
            values = script.named(values.view(-1, cols), f"{self._name(number)}_cells")
            vector = factors[0][1] if factors else None
            self._contraction.multiply_rows(
                number, over_rows, start, values, vector, local, False, 1.0
            )
        if local is not out:
            script.call("copy_", out, local)
        return out

    def _sum_cells(
        self,
        number: int,
        target: Part,
        values: Tensor,
        factors: list[tuple[Part, Tensor]],
        out: Tensor,
    ) -> None:
        """The same for labels on any axes: cell by cell."""
        script = self._script
        for part, vector in factors:
            product = self._cells.product(number, values)
            shaped = script.named(vector.view(part.shape), f"{script.name_of(vector)}_by_cells")
            script.call(torch.mul, values, shaped, out=product)
            values = product
        axes = [axis for axis in range(values.dim()) if axis not in target.axes]
        kept = [size for axis, size in enumerate(values.shape) if axis in target.axes]
        view = script.named(out.view(kept), f"{script.name_of(out)}_by_cells")
        if axes:
            script.call(torch.amax if self._largest else torch.sum, values, axes, out=view)
        else:
            script.call("copy_", view, values)

    def _foreign(self, block: int) -> bool:
        """Its cells have another dtype or device than the scales."""
        like = self._cells.like(block)
        return (like.dtype, like.device) != (self._state.sums.dtype, self._state.sums.device)

    def _extends(self, group: int, coefficient: float) -> bool:
        """Whether a touch of the group has been written in this batch; and now one has."""
        before = (group, coefficient) in self._written
        self._written.add((group, coefficient))
        return before

    def _name(self, block: int) -> str:
        return self._recipe.layout.entries[self._recipe.layout.blocks[block].entry].name

    def _allocate(self) -> dict[tuple[int, float], Tensor]:
        """Sums by group and coefficient; those of a kind lie at even distances."""
        groups, sums = self._recipe.layout.groups, {}
        for side in ("positive", "negative"):
            for rank in range(max((len(getattr(g, side)) for g in groups), default=0)):
                for number, group in enumerate(groups):
                    for coefficient in getattr(group, side)[rank : rank + 1]:
                        sums[number, coefficient] = self._state.take(group.channels)
        return sums


def _matrix(block: Block, part_number: int) -> tuple[int, int, bool] | None:
    """The block as a matrix (rows, cols) whose rows, or columns (True), are the part's positions.

    None where the other factors do not lie along the other axis.
    """
    target, count = block.parts[part_number], len(block.shape)
    rest = [part.axes for part in block.parts if part is not target]
    for over_rows in (False, True):
        split = count - len(target.axes) if over_rows else len(target.axes)
        leading, trailing = tuple(range(split)), tuple(range(split, count))
        own, other = (trailing, leading) if over_rows else (leading, trailing)
        if target.axes == own and all(axes == other for axes in rest):
            rows = math.prod(block.shape[:split])
            return rows, math.prod(block.shape[split:]), over_rows
    return None


def _is_own(term: CellTerm, touch: Touch, group: GroupLayout) -> bool:
    """Whether the touch is of this term."""
    if term.coefficient != touch.coefficient:
        return False
    ids = term.ids[touch.positions]
    channels = touch.channels
    if isinstance(channels, slice):
        channels = torch.arange(channels.start, channels.stop, device=ids.device)
    return torch.equal(ids, channels + group.start)
