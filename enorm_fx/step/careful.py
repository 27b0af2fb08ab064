"""The careful step, which decides wherever there is doubt: bind, measure, solve, decide, apply.

Everything that can fail is decided before the first write, so a step is all or nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from enorm_fx.errors import PlanError
from enorm_fx.plan.data import PlanData
from enorm_fx.plan.records import Group
from enorm_fx.step.checks import find_held
from enorm_fx.step.descent import Descent, log_factors, sweep_
from enorm_fx.step.factors import (
    Factors,
    FactorTable,
    Write,
    make_factors,
    make_table,
    multiply_,
)
from enorm_fx.step.following import gradient_write, state_writes
from enorm_fx.step.in_range import Range
from enorm_fx.step.layout import Block, Entry, Layout, Turns, make_layout
from enorm_fx.step.measure import (
    accumulation_dtype,
    block_values,
    clear_removed_,
    max_abs,
    measure_,
)
from enorm_fx.step.normal_range import HeldBack, hold_in_range_
from enorm_fx.step.optimizer_state import exponents
from enorm_fx.step.precision import full_precision
from enorm_fx.step.recipe import Recipe
from enorm_fx.step.sharded_cells import ShardedCells, sharded_cells
from enorm_fx.step.shards import (
    Shard,
    agreed,
    local,
    local_entry,
    placement,
    reduce_,
    reshard_,
    shard_of,
)
from enorm_fx.step.streamed import StreamedCells, bound, streamable, streamed

Made = TypeVar("Made")


class CarefulStep:
    """Index maps and workspaces for one plan, one choice of groups, one p and c.

    active: the groups that may move; None: all scales may, as the caller says (nothing to solve).
    order: see `make_layout`.
    wide: accumulate in float64.
    room: bytes that cells may take; of weights that would need more they are computed when needed,
          where that is possible. None: all are in memory.

    Parameters are looked up by name before every use: a model whose parameters were replaced, cast
    or moved is bound anew, one whose shapes changed raises PlanError. Of a DTensor this process
    measures and multiplies the part that it holds; see `enorm_fx.step.shards`.
    """

    def __init__(
        self,
        plan: PlanData,
        active: Iterable[Group] | None,
        *,
        p: float = math.inf,
        c: float = 1.0,
        order: str | Turns = "sequential",
        exact: bool = False,
        wide: bool = False,
        room: int | None = None,
    ) -> None:
        self._plan, self._active = plan, None if active is None else tuple(active)
        self._p, self._c, self._order = p, c, order
        self._exact, self._wide, self._room = exact, wide, room
        self._parameters: list[nn.Parameter] = []
        self._shards: list[Shard | None] = []
        self._held: list[Entry] = []  # entries as if what this process holds were all
        self._signature: tuple[object, ...] = ()
        self._layout = Layout(plan.num_scales, (), (), (), ())
        self._table = FactorTable((), ())
        self._cells: dict[int, Tensor] = {}
        self._streamed: frozenset[int] = frozenset()
        self._range = Range.of(self._layout, [], self._table, [], p, self.device)
        self._bound = False

    @property
    def model(self) -> nn.Module:
        return self._plan.model

    @property
    def names(self) -> list[str]:
        """The parameters that move."""
        return [entry.name for entry in self._layout.entries]

    @property
    def fastest(self) -> float:
        """The most that log |w| of any entry changes by, in units of max |u|."""
        return max([0.0, *(entry.rate for entry in self._layout.entries)])

    @property
    def device(self) -> torch.device:
        """Where log scales live: the device of the first parameter that moves."""
        return self._parameters[0].device if self._parameters else torch.device("cpu")

    @property
    def sharded(self) -> bool:
        """Whether this process holds only a part of some weight."""
        return any(shard is not None for shard in self._shards)

    def bind_(self) -> None:
        """Look the parameters up; compile if they are not those of the last time."""
        reshard_(self._plan.model)
        if self._bound:
            names = [entry.name for entry in self._layout.entries]
            parameters = [find_held(self._plan.model, name) for name in names]
            if self._signature == _signature(parameters):
                return
        self._compile()

    def _compile(self) -> None:
        layout = make_layout(self._plan, self._active, torch.device("cpu"), self._order)
        parameters = [_checked(self._plan.model, entry) for entry in layout.entries]
        if parameters and parameters[0].device.type != "cpu":
            layout = make_layout(self._plan, self._active, parameters[0].device, self._order)
        names = [entry.name for entry in layout.entries]
        self._shards = [shard_of(p, name) for p, name in zip(parameters, names, strict=True)]
        self._layout, self._parameters = layout, parameters
        self._signature = _signature(parameters)
        self._held = [local_entry(e, s) for e, s in zip(layout.entries, self._shards, strict=True)]
        self._table = make_table(self._held)
        in_parts = {number for number, shard in enumerate(self._shards) if shard is not None}
        self._streamed = _streamed(layout, self._room) - in_parts
        self._cells = {
            number: torch.empty(
                layout.entries[number].cells,
                dtype=self._dtype(parameters[number]),
                device=parameters[number].device,
            )
            for number in sorted({b.entry for b in layout.blocks} - self._streamed - in_parts)
        }
        self._range = Range.of(layout, self._held, self._table, parameters, self._p, self.device)
        self._bound = True

    def _dtype(self, weight: Tensor) -> torch.dtype:
        """Of the cells of a weight."""
        return accumulation_dtype(weight.dtype, self._p, self._wide)

    def recipe(self, writes: list[Write], cycles: int) -> Recipe:
        """What a backend needs to know, for the memory that is bound now."""
        weights = tuple(parameter.detach() for parameter in self._parameters)
        detached = tuple(Write(w.entry, w.tensor.detach(), w.exponent) for w in writes)
        return Recipe(self._layout, weights, detached, self._p, self._c, cycles, self._exact)

    def run_(
        self, optimizers: Sequence[Optimizer], buffers: Mapping[str, int] | None, cycles: int
    ) -> None:
        """Measure, solve, apply, with care: in log space, every number looked at.

        Raises NonFiniteError, OptimizerStateError or PlanError, with nothing written.
        """
        self.bind_()
        with full_precision(self.device):
            writes = self.together(lambda: self.collect(optimizers, buffers, gradients=False))
            u, sizes = self.solve(cycles)
            self.apply_(u, sizes, writes)

    def solve(self, cycles: int) -> tuple[Tensor, Tensor]:
        """Log scales after some cycles, (num_scales + 1,), and the sizes of `measure_`."""
        with full_precision(self.device):
            descent, sizes = self.measure_()
            for _ in range(cycles):
                sweep_(descent, self._exact)
        return descent.u, sizes

    def largest_change(self, u: Tensor) -> float:
        """The largest |log factor| of any entry that this process holds, under these scales."""
        found = [0.0]
        for entry in self._held:
            logs = [log_factors(part, u) for part in entry.parts if math.prod(part.shape)]
            found += [abs(sum(float(one.max()) for one in logs)),
                      abs(sum(float(one.min()) for one in logs))]  # fmt: skip
        return max(found)

    def zeros(self) -> Tensor:
        """Log scales that change nothing, float64, (num_scales + 1,)."""
        return torch.zeros(self._layout.num_scales + 1, dtype=torch.float64, device=self.device)

    def measure_(self) -> tuple[Descent, Tensor]:
        """Fill the workspaces: the descent at u = 0, and a bound on max |w| of every entry.

        The bounds, float64 (entries,), are not finite where the weight is not.
        """
        sizes = []
        elsewhere: dict[int, Tensor | StreamedCells | ShardedCells] = {}
        blocks = self._layout.blocks
        for number, (entry, weight) in enumerate(self._pairs()):
            shard = self._shards[number]
            if number in self._cells:
                cells = self._cells[number]
                measure_(weight, entry, self._p, cells)
                largest = cells.amax() if math.isinf(self._p) else cells.sum() ** (1 / self._p)
            elif number in self._streamed:
                stream = streamed(weight.detach(), entry, self._p, self._dtype(weight))
                elsewhere[number], largest = stream, bound(stream)
            else:
                largest = _largest(weight)
            own = [block for block in blocks if block.entry == number] if shard else []
            if shard and own:
                whole = self._layout.entries[number]
                elsewhere[number] = sharded_cells(
                    weight, whole, entry, shard, own, self._p, self._dtype(weight)
                )
            sizes.append(largest.to(self.device, torch.float64))
        values = self._block_values(elsewhere)
        if self.sharded:
            # What every process has must be the same in all: they would go different ways, and wait
            # for each other for ever.
            everywhere = [v.double() for v in values if isinstance(v, Tensor)]
            agreed(lambda: None, everywhere, self.device)
        return Descent(self._layout, values, self._p, self._c, self.zeros()), self._whole(sizes)

    def _block_values(
        self, elsewhere: dict[int, Tensor | StreamedCells | ShardedCells]
    ) -> list[Tensor | StreamedCells | ShardedCells]:
        """The cells of each block, of those that were measured or, by entry, from elsewhere."""
        blocks, cells = self._layout.blocks, {**self._cells, **elsewhere}
        values: dict[int, Tensor | StreamedCells | ShardedCells] = {}
        for picked in (True, False):
            for number, block in enumerate(blocks):
                found = cells[block.entry]
                if not isinstance(found, Tensor):
                    values[number] = found
                elif (block.picked is not None) is picked:
                    values[number] = block_values(block, found)
        for block in blocks:
            found = cells[block.entry]
            if isinstance(found, Tensor):
                clear_removed_(block, found)
        return [values[number] for number in range(len(blocks))]

    def sizes(self) -> Tensor:
        """max |w| of every entry, float64 (entries,)."""
        return self._whole([_largest(w).to(self.device, torch.float64) for _, w in self._pairs()])

    def collect(
        self,
        optimizers: Sequence[Optimizer],
        buffers: Mapping[str, int] | None,
        gradients: bool,
    ) -> list[Write]:
        """Every tensor to be written: weights, their gradients if asked for, optimizer state."""
        known = [(optimizer, exponents(optimizer, buffers)) for optimizer in optimizers]
        writes = []
        for number, (entry, weight) in enumerate(zip(self._held, self._parameters, strict=True)):
            held = local(weight)
            if not held.numel():
                continue
            writes.append(Write(number, held, 1))
            if gradients:
                writes += gradient_write(number, entry, weight)
            for optimizer, powers in known:
                writes += state_writes(number, entry, weight, optimizer, powers)
        return writes

    def together(self, attempt: Callable[[], Made], *found: Tensor) -> Made:
        """What the attempt gives, where the processes that share the weights all succeed."""
        return agreed(attempt, found, self.device) if self.sharded else attempt()

    def hold_in_range_(self, u: Tensor) -> tuple[HeldBack, ...]:
        """Bring scales that are multiples of log 2 closer to 0, until no number loses digits."""
        if self.sharded:
            raise PlanError(
                "exact=True keeps every number in its normal range, which is not known here of "
                "weights that lie in parts on several processes; nothing was written. Balance "
                "before sharding, and make ENorm with start='as_is'"
            )
        return hold_in_range_(u, zip(self._held, self._parameters, strict=True))

    def apply_(self, u: Tensor, sizes: Tensor, writes: list[Write]) -> None:
        """Write, if every number stays finite. u: (num_scales + 1,), sizes: of `measure_`.

        Raises NonFiniteError, with nothing written.
        """
        factors = self.together(lambda: self._decided(u, sizes, writes), u)
        multiply_(writes, self._held, self._table, factors)

    def edits(self, u: Tensor, sizes: Tensor) -> dict[str, Callable[[Tensor], None]]:
        """For each weight that moves, by name, what multiplies a tensor of its shape and device
        in place, as `apply_` would the weight. The tensor has the weight's type, or is float64.
        Nothing is written.

        Raises NonFiniteError.
        """
        writes = self.collect((), None, gradients=False)
        wide = [Write(w.entry, w.tensor.new_empty(0, dtype=torch.float64), 1) for w in writes]
        factors = self._decided(u, sizes, writes, also=wide)

        def edit(number: int) -> Callable[[Tensor], None]:
            def multiply(tensor: Tensor) -> None:
                write = Write(number, tensor, 1)
                multiply_([write], self._held, self._table, factors)

            return multiply

        return {entry.name: edit(number) for number, entry in enumerate(self._layout.entries)}

    def _decided(
        self, u: Tensor, sizes: Tensor, writes: list[Write], also: Iterable[Write] = ()
    ) -> Factors:
        """The factors of the writes, and of others that do not count in what is decided.

        Raises NonFiniteError where a number would leave its range.
        """
        factors = make_factors(self._table, u, [*writes, *also], self._exact)
        if self._parameters:
            self._range.check(u, sizes, writes, factors, map(local, self._parameters))
        return factors

    def _pairs(self) -> Iterable[tuple[Entry, Tensor]]:
        """What this process holds of each parameter that moves, and its entry."""
        return zip(self._held, map(local, self._parameters), strict=True)

    def _whole(self, sizes: list[Tensor]) -> Tensor:
        """Bounds of the entries, stacked, of which each process has found those of its part."""
        if not sizes:
            return self.zeros()[:0]
        # A maximum over processes may lose a NaN, and keeps inf.
        bounds = torch.stack(sizes)
        bounds = torch.where(bounds.isfinite(), bounds, math.inf) if self.sharded else bounds
        parts = zip(self._shards, bounds, strict=True)
        reduce_([(shard.groups, size) for shard, size in parts if shard], largest=True)
        return bounds


def _streamed(layout: Layout, room: int | None) -> frozenset[int]:
    """Entries whose cells shall not be in memory: the largest, until the others have room."""
    if room is None:
        return frozenset()
    blocks: dict[int, list[Block]] = {}
    for block in layout.blocks:
        blocks.setdefault(block.entry, []).append(block)
    size = {number: 8 * math.prod(layout.entries[number].cells) for number in blocks}
    needed, found = sum(size.values()), set()
    for number in sorted(blocks, key=size.__getitem__, reverse=True):
        if needed > room and streamable(layout.entries[number], blocks[number]):
            found.add(number)
            needed -= size[number]
    return frozenset(found)


def _signature(parameters: list[nn.Parameter]) -> tuple[object, ...]:
    # id() is safe here: the step holds the parameters, so no other object takes their place.
    return tuple((id(p), p.dtype, p.device, p.shape, placement(p)) for p in parameters)


def _checked(model: nn.Module, entry: Entry) -> nn.Parameter:
    parameter = find_held(model, entry.name)
    if tuple(parameter.shape) != entry.shape:
        raise PlanError(
            f"'{entry.name}' has shape {tuple(parameter.shape)} and had {entry.shape} when it was "
            "analyzed; nothing was written. Analyze the model again"
        )
    if not parameter.dtype.is_floating_point or parameter.is_meta:
        raise PlanError(
            f"'{entry.name}' is {parameter.dtype} on {parameter.device}; only real floating point "
            "weights that hold data can be rescaled. Of a pipeline, analyze the stage that is here"
        )
    return parameter


def _largest(weight: Tensor) -> Tensor:
    return max_abs(weight) if weight.numel() else weight.new_zeros(())
