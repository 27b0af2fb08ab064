"""The eager backend: a step written as straight-line tensor operations over fixed memory.

    measure    cells of every counted weight               cells.py
    solve      cycles over the groups, in linear space     marginals.py, updates.py
    decide     is everything finite, and well in range?    here
    multiply   every tensor by its factors, or by ones     products.py

Nothing is read back, so the same calls can be captured as one CUDA graph.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from enorm_fx.step.generated.cell_storage import CellStorage
from enorm_fx.step.generated.multiply import LineFactors, Multiply
from enorm_fx.step.generated.script import Built, Result, Script, text
from enorm_fx.step.generated.state import State, make_state
from enorm_fx.step.generated.tuning import Tuning, tuning_for
from enorm_fx.step.generated.updates import Updates
from enorm_fx.step.precision import full_precision
from enorm_fx.step.recipe import Recipe

# Parts of the exponent range that weights, and factors, may take. They add up to less than one, so
# that a weight times its factors stays in range.
_SIZES, _FACTORS = 1 / 2, 1 / 3


@dataclass(frozen=True, slots=True, eq=False)
class Eager:
    """A generated step. module(*arguments) runs it."""

    built: Built
    device: torch.device

    @property
    def module(self) -> GraphModule:
        return self.built.module

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.built.arguments

    @property
    def code(self) -> str:
        """The module's code, with comments."""
        return text(self.built)

    def run(self) -> Tensor:
        """Measure, solve, apply: 0-dim bool. False: nothing has changed."""
        with full_precision(self.device):
            ok: Tensor = self.built.module.forward(*self.built.arguments)
        return ok


@dataclass(frozen=True, slots=True, eq=False)
class FactorStep:
    """A generated step that ends before it multiplies.

    factors: of each write of the recipe, filled when the step runs; ones, if that says False.
    reach: 0-dim, exp(p * max |u|) then (p = inf: without p).
    """

    step: Eager
    factors: list[LineFactors]
    reach: Tensor


def generate(recipe: Recipe, tuning: Tuning | None = None) -> Eager:
    """Write the step of a recipe. All memory that it needs is allocated here."""
    with torch.no_grad():
        begun = _Begun(recipe, tuning)
        begun.multiply.write(begun.ok)
        return begun.built()


def generate_factors(recipe: Recipe) -> FactorStep:
    """Write what finds the factors of a recipe, whose tensors have entries and no gaps."""
    with torch.no_grad():
        begun = _Begun(recipe, None)
        factors = begun.multiply.factors(begun.ok)
        return FactorStep(begun.built(), factors, begun.reach)


class _Begun:
    """Measure, solve, decide."""

    def __init__(self, recipe: Recipe, tuning: Tuning | None) -> None:
        self._script = script = Script()
        _name(script, recipe)
        state = make_state(script, recipe)
        self._device = state.scales.device
        if tuning is None:
            tuning = tuning_for(self._device)
        cells = CellStorage(script, recipe, state, tuning)
        updates = Updates(script, recipe, state, cells, tuning)
        checks = _Checks(script, recipe, state)
        scales = script.named(state.scales, "scales")
        script.section("measure: sums of |w|^p over entries that take the same factor")
        script.call("fill_", scales, script.number("one", 1.0, scales))
        cells.measure()
        for cycle in range(recipe.cycles):
            updates.cycle()
            if cycle == 0:
                checks.sizes(updates.least_share)
            self.reach = checks.factors()
        checks.products()
        self.ok = checks.all()
        self.multiply = Multiply(script, recipe, state, tuning)

    def built(self) -> Eager:
        return Eager(self._script.build(self.ok), self._device)


def _name(script: Script, recipe: Recipe) -> None:
    names = [entry.name for entry in recipe.layout.entries]
    for name, weight in zip(names, recipe.weights, strict=True):
        script.named(weight, name)
    for write in recipe.writes:
        # What is not a weight by now is a buffer of the optimizer.
        script.named(write.tensor.detach(), f"{names[write.entry]}_buffer")


class _Checks:
    """Writes what decides whether a step may be applied: numbers that must be below limits.

    Sums and factors are float32 or wider, and keep to their parts of that range. Where a weight is
    narrower (float16), a bound on its entries times one on its factors must be in its own. Every
    comparison is one that a NaN fails.
    """

    def __init__(self, script: Script, recipe: Recipe, state: State) -> None:
        self._script, self._recipe, self._state = script, recipe, state
        self._uncounted = _uncounted(recipe)
        room = 2 * (1 + len(self._uncounted)) + recipe.cycles
        self._numbers, self._limits = state.sums.new_zeros(room), [1.0] * room
        self._taken = 0
        wide = [torch.promote_types(w.tensor.dtype, torch.float32) for w in recipe.writes]
        limit = min(map(_log_most, [state.sums.dtype, *wide]))
        # Nobody looks at how large a buffer is, so its factors keep to a part of its own range.
        buffers = [_log_most(w.tensor.dtype) for w in recipe.writes if w.exponent != 1]
        rates = (recipe.layout.entries[w.entry].rate * abs(w.exponent) for w in recipe.writes)
        fastest = max([1.0, *rates])
        self._log_size = _SIZES * limit
        self._log_factor = _FACTORS * min([limit, *buffers]) / fastest
        self._narrow = {
            w.tensor.dtype
            for w in recipe.writes
            if w.exponent == 1 and _log_most(w.tensor.dtype) < (_SIZES + _FACTORS) * limit
        }
        self._factor: Tensor | None = None
        # Bounds on entries of narrow weights: the slot, the power of the entry that is in it, and
        # the log of what it was multiplied by.
        self._sizes: list[tuple[Tensor, float, float]] = []

    def sizes(self, least_share: float) -> None:
        """The weights as they are: sums of the first cycle, and tensors that are in none.

        least_share: of a weight in the sums.
        """
        script, power = self._script, self._recipe.power
        script.section("are the weights finite, and well in range?")
        if self._state.taken:
            sums = script.named(self._state.sums[: self._state.taken], "sums")
            slot = self._slot(power * self._log_size + math.log(least_share))
            script.call(torch.amax, sums, 0, out=slot)
            if self._narrow:
                self._sizes.append((slot, power, math.log(least_share)))
        for tensors in self._uncounted:
            line, slot = self._line(tensors), self._slot(self._log_size)
            dtype = torch.promote_types(line.dtype, torch.float32)
            largest = script.call(torch.linalg.vector_norm, line, math.inf, dtype=dtype)
            script.call("copy_", slot, largest)
            if line.dtype in self._narrow:
                self._sizes.append((slot, 1.0, 0.0))

    def factors(self) -> Tensor:
        """The scales after a cycle, up and down: where the largest will be, 0-dim."""
        script = self._script
        script.section("are the factors finite, and well in range?")
        self._factor = self._slot(self._recipe.power * self._log_factor)
        flat = script.named(self._state.scales.view(-1), "scales_flat")
        script.call(torch.amax, flat, 0, out=self._factor)
        return self._factor

    def products(self) -> None:
        """Entries of narrow weights, times the factors of the last cycle."""
        if not self._sizes or self._factor is None:
            return
        script, recipe = self._script, self._recipe
        name = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self._narrow))
        script.section(f"does {name} hold the weights times their factors?")
        limit = min(map(_log_most, self._narrow))
        moved = zip(recipe.layout.entries, recipe.weights, strict=True)
        rate = max(entry.rate for entry, weight in moved if weight.dtype in self._narrow)
        for size, power, log_share in self._sizes:
            product = self._slot(power * limit + log_share)
            script.call(torch.pow, self._factor, rate * power / recipe.power, out=product)
            script.call("mul_", product, size)

    def all(self) -> Result:
        """0-dim bool: every number is below its limit."""
        script = self._script
        numbers = script.named(self._numbers, "largest")
        limits = script.named(self._numbers.new_tensor(self._limits), "limits")
        below = script.call(torch.lt, numbers, limits, name="in_range")
        return script.call(torch.all, below, name="ok")

    def _slot(self, log_limit: float) -> Tensor:
        number, most = self._taken, torch.finfo(self._numbers.dtype).max
        self._taken += 1
        self._limits[number] = math.exp(min(log_limit, math.log(most) - 1e-12))
        return self._script.named(self._numbers[number], f"largest_{number}")

    def _line(self, tensors: Sequence[Tensor]) -> Tensor:
        """All entries of the tensors in one."""
        if len(tensors) == 1:
            return tensors[0]
        script = self._script
        line = script.named(tensors[0].new_empty(sum(t.numel() for t in tensors)), "uncounted")
        lines = [script.named(t.view(-1), script.name_of(t)) for t in tensors]
        script.call(torch.cat, lines, out=line)
        return line


def _log_most(dtype: torch.dtype) -> float:
    """Log of the largest number of a dtype."""
    return math.log(torch.finfo(dtype).max)


def _uncounted(recipe: Recipe) -> list[list[Tensor]]:
    """Weights that are in no sum; small ones, biases mostly, by dtype and device."""
    alone, together = [], defaultdict(list)
    for entry, weight in zip(recipe.layout.entries, recipe.weights, strict=True):
        if not entry.counted:
            if weight.dim() == 1 and weight.is_contiguous():
                together[weight.dtype, weight.device].append(weight)
            else:
                alone.append([weight])
    return [*together.values(), *alone]
