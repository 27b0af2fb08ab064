"""Steps of groups in a generated step: new scales from marginals, batch by batch.

With x = exp(p * u) of one channel (p = inf: exp(u)) and the rest of the network fixed, the cells
that it moves add up to  sum over a of M_a * x^a.  M_a is the sum (maximum) of the cells that take
the coefficient a, times the factors of all other scales; with one coefficient a > 0 and one -b < 0

    x = (b * M_b / (a * M_a)) ^ (1 / (a + b))          (p = inf: without b and a)

whatever x was before. Channels with nothing on one side stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from enorm_fx.step.descent import LogMarginals, best_step, power_of
from enorm_fx.step.generated.cell_storage import CellStorage
from enorm_fx.step.generated.marginals import Marginals, Product
from enorm_fx.step.generated.script import Script
from enorm_fx.step.generated.state import State, strided
from enorm_fx.step.generated.tuning import Tuning
from enorm_fx.step.layout import GroupLayout
from enorm_fx.step.recipe import Recipe


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """Groups of one structure, at even distances in memory, that are updated by the same calls.

    products: of each group, by touch; None for a single group of an uncommon kind.
    """

    groups: tuple[int, ...]
    products: tuple[tuple[Product, ...], ...] | None


class Updates:
    """Writes cycles over the groups of a recipe."""

    def __init__(
        self, script: Script, recipe: Recipe, state: State, cells: CellStorage, tuning: Tuning
    ) -> None:
        self._script, self._recipe, self._state, self._cells = script, recipe, state, cells
        self._marginals = Marginals(script, recipe, state, cells)
        self._small = tuning.small

    @property
    def least_share(self) -> float:
        """The least weight that c gives to a summand of the sums."""
        groups = self._recipe.layout.groups
        shares = (self._marginals.share(group, t) for group in groups for t in group.touches)
        return min(shares, default=1.0)

    def cycle(self) -> None:
        """One cycle over all groups."""
        groups = self._recipe.layout.groups
        for batch in self._recipe.layout.batches:
            # A group with one side only has no minimum, and stays.
            self._batch([g for g in batch if groups[g].positive and groups[g].negative])
        self._marginals.check_rest()

    def _batch(self, numbers: list[int]) -> None:
        self._marginals.begin()
        turns = self._turns(numbers)
        touches = [(turn, rank) for turn in turns for rank in range(len(self._first(turn).touches))]
        # What lies in a slot is read before it is overwritten.
        for turn, rank in sorted(touches, key=lambda pair: self._cost(*pair)):
            self._script.section(self._title(turn))
            if turn.products is None:
                self._marginals.collect(turn.groups[0], self._first(turn).touches[rank])
            else:
                self._marginals.multiply(turn.groups, [found[rank] for found in turn.products])
        for turn in turns:
            self._script.section(self._title(turn))
            self._step(turn.groups)
        for number in numbers:
            self._marginals.moved(self._recipe.layout.groups[number])

    def _first(self, turn: _Turn) -> GroupLayout:
        return self._recipe.layout.groups[turn.groups[0]]

    def _cost(self, turn: _Turn, rank: int) -> tuple[bool, int]:
        block = self._first(turn).touches[rank].block
        return not self._cells.resident(block), self._recipe.layout.blocks[block].entry

    def _turns(self, numbers: list[int]) -> list[_Turn]:
        """Split the groups into runs that one call can update: same structure, evenly spaced."""
        kinds: dict[object, list[tuple[int, tuple[Product, ...]]]] = {}
        turns = []
        for number in numbers:
            group = self._recipe.layout.groups[number]
            simple = len(group.positive) == len(group.negative) == 1
            products = self._marginals.as_products(group) if simple else None
            if products is None:
                turns.append(_Turn((number,), None))
            else:
                kinds.setdefault(self._structure(number, products), []).append((number, products))
        for members in kinds.values():
            places = [
                (self._recipe.layout.groups[n].start, *self._marginals.places(n, p))
                for n, p in members
            ]
            for start, stop in _even_runs(places):
                run = members[start:stop]
                turns.append(_Turn(tuple(n for n, _ in run), tuple(p for _, p in run)))
        return sorted(turns, key=lambda turn: turn.groups[0])

    def _structure(self, number: int, products: Sequence[Product]) -> object:
        """What groups that are updated together have in common."""
        group = self._recipe.layout.groups[number]
        blocks = [self._recipe.layout.blocks[product.block] for product in products]
        together = all(
            math.prod(block.shape) <= self._small and self._cells.stored(product.block) is not None
            for product, block in zip(products, blocks, strict=True)
        )
        return (
            None if together else number,
            (group.channels, group.damping, group.positive, group.negative),
            tuple(
                (p.length, p.strides, p.coefficient, p.share, p.factors and p.factors[0])
                for p in products
            ),
        )

    def _title(self, turn: _Turn) -> str:
        group, layout = self._first(turn), self._recipe.layout
        sides = [
            ", ".join(
                dict.fromkeys(
                    layout.entries[layout.blocks[t.block].entry].name
                    for t in group.touches
                    if (t.coefficient > 0) is positive
                )
            )
            for positive in (True, False)
        ]
        text = f"group {turn.groups[0]}: {sides[0]} -> {sides[1]}, {group.channels} channels"
        more = len(turn.groups) - 1
        return f"{text}; likewise {more} more, up to group {turn.groups[-1]}" if more else text

    # ---- steps ----

    def _step(self, numbers: tuple[int, ...]) -> None:
        group, script = self._recipe.layout.groups[numbers[0]], self._script
        starts = [self._recipe.layout.groups[number].start for number in numbers]
        columns = self._state.scales.shape[1]
        up, down = (
            strided(self._state.scales, [row + start for start in starts], (group.channels,), (1,))
            for row in (0, columns)
        )
        script.named(up, f"up_{starts[0]}")
        script.named(down, f"down_{starts[0]}")
        ratio = script.scratch("ratio", up.shape, up)
        if len(group.positive) == len(group.negative) == 1:
            a, b = group.positive[0], -group.negative[0]
            plain = a == b == 1 and group.damping == 1 and not self._recipe.exact
            self._ratio(numbers, ratio, up, plain)
        else:
            plain = False
            sums = [
                [self._marginals.sums(numbers, a) for a in side]
                for side in (group.positive, group.negative)
            ]
            coefficients = group.positive, group.negative
            step = script.call(minimize, self._recipe.p, *coefficients, *sums, up, name="factor")
            script.call("copy_", ratio, step)
        if plain:
            script.call(torch.sqrt, ratio, out=up)
        else:
            self._move(group, ratio, up)
        script.call(torch.reciprocal, up, out=down)

    def _ratio(self, numbers: tuple[int, ...], ratio: Tensor, up: Tensor, plain: bool) -> None:
        """plain: ratio = M_b / M_a, 1 for dead channels. Else it is new x / old x."""
        group, script = self._recipe.layout.groups[numbers[0]], self._script
        a, b = group.positive[0], -group.negative[0]
        above, below = (self._marginals.sums(numbers, k) for k in (a, -b))
        smaller = script.scratch("smaller", ratio.shape, ratio)
        dead = script.scratch("dead", ratio.shape, ratio.new_empty(0, dtype=torch.bool))
        script.call(torch.div, below, above, out=ratio)
        script.call(torch.minimum, above, below, out=smaller)
        # Not "alive if larger": a NaN must come through.
        script.call(torch.lt, smaller, script.number("tiny", self._tiny(group), ratio), out=dead)
        if not plain:
            if a != b and not math.isinf(self._recipe.p):
                script.call("mul_", ratio, b / a)
            script.call("pow_", ratio, 1 / (a + b))
            script.call("div_", ratio, up)
        script.call("masked_fill_", ratio, dead, script.number("one", 1.0, ratio))

    def _move(self, group: GroupLayout, ratio: Tensor, up: Tensor) -> None:
        """x *= ratio, damped, and a power of two if so wanted."""
        script, recipe = self._script, self._recipe
        if group.damping > 1:
            script.call("pow_", ratio, 1 / group.damping)
        if recipe.exact:
            script.call("log2_", ratio)
            script.call("mul_", ratio, 1 / recipe.power)
            script.call("round_" if group.symmetric else "trunc_", ratio)
            script.call("mul_", ratio, recipe.power)
            script.call("exp2_", ratio)
        script.call("mul_", up, ratio)

    def _tiny(self, group: GroupLayout) -> float:
        """A sum below this has no digits left: the unit counts as dead."""
        dtypes = {self._cells.like(touch.block).dtype for touch in group.touches}
        return max(torch.finfo(dtype).tiny for dtype in dtypes)


def minimize(
    p: float,
    positive: Sequence[float],
    negative: Sequence[float],
    above: Sequence[Tensor],
    below: Sequence[Tensor],
    x: Tensor,
) -> Tensor:
    """new x / old x for three or more coefficients, by Newton's method; 1 for dead channels.

    above, below: M_a of the positive and of the negative coefficients, (channels,); x: (channels,).
    """
    log_x = x.double().log()
    tiny = torch.finfo(x.dtype).tiny

    def side(
        coefficients: Sequence[float], sums: Sequence[Tensor]
    ) -> tuple[tuple[float, Tensor], ...]:
        return tuple(
            (a, torch.where(m < tiny, 0.0, m).double().log() + a * log_x)
            for a, m in zip(coefficients, sums, strict=True)
        )

    marginals = LogMarginals(side(positive, above), side(negative, below))
    step = torch.where(marginals.alive(), best_step(p, marginals), 0.0)
    return (power_of(p) * step).exp().to(x)


def _even_runs(places: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """(start, stop) of stretches in which each number grows by the same amount, 0 or more, from
    one to the next."""
    runs, start = [], 0
    while start < len(places):
        stop, distance = start + 1, None
        while stop < len(places):
            found = [b - a for a, b in zip(places[stop - 1], places[stop], strict=True)]
            if distance is None:
                distance = found
            if found != distance or min(found) < 0:
                break
            stop += 1
        runs.append((start, stop))
        start = stop
    return runs
