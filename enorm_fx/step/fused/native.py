"""The same step by one call of C++: tables of what is updated, around those of the rescaling."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.fused.fixed_memory import FixedMemory, Stepping
from enorm_fx.step.fused.held import (
    Held,
    check_gradients,
    reach_of,
)
from enorm_fx.step.fused.optimizers import numbers_of, rates_of
from enorm_fx.step.layout import Layout
from enorm_fx.step.native import tables
from enorm_fx.step.native.backend import threads_now
from enorm_fx.step.native.compiler import load
from enorm_fx.step.native.pack import DTYPES, Packer, threads_for
from enorm_fx.step.recipe import Recipe


class NativeFused:
    """Tables for the memory as it is now; `holds` says whether it still is.

    Raises CompilerError or Unsupported where it cannot serve.
    """

    name = "native"

    def __init__(
        self,
        careful: Sequence[CarefulStep],
        held: Iterable[Held],
        optimizer: Optimizer,
        cycles: int,
        p: float,
    ) -> None:
        self._library = load()
        self._optimizer = optimizer
        self._memory = FixedMemory(careful[0].model, held, optimizer, p, "cpu", self._adder)
        self._numbers = {q.data_ptr(): k for k, q in enumerate(self._memory.parameters)}
        self._make_tables(careful, cycles)
        self._numbered: list[int] = []
        self._found: int | None = None

    def holds(self) -> bool:
        """True: the memory is what it was, and the optimizer does the same."""
        return self._memory.holds()

    def _adder(self, counters: Sequence[Tensor]) -> Callable[[], None]:
        """What adds one to counters of steps: torch takes a microsecond and more for each."""
        if not all(map(_is_plain_number, counters)):
            return partial(torch._foreach_add_, counters, 1)
        places = (ctypes.c_void_p * max(1, len(counters)))(*(c.data_ptr() for c in counters))
        dtypes = (ctypes.c_int64 * max(1, len(counters)))(*(DTYPES[c.dtype] for c in counters))

        def add() -> None:
            if counters:
                self._library.enorm_count(places, dtypes, len(counters))
                torch.autograd.graph.increment_version(counters)

        return add

    # ---- tables

    def _make_tables(self, careful: Sequence[CarefulStep], cycles: int) -> None:
        self._keep: list[Any] = []
        parameters, buffers = self._memory.parameters, self._memory.buffers
        count = len(parameters)
        # Small matrices are not shared: threads would only wait for one another. Kernels are.
        self._threads = threads_for(sum(
            p.numel() * (2 + len(b))
            for p, b in zip(parameters, buffers, strict=True)
            if p.numel() >= tables.ALONE or p.dim() > 2
        ))  # fmt: skip
        self._gradients = (ctypes.c_void_p * max(1, count))()
        self._rates_of = (ctypes.c_int64 * max(1, count))()
        self._rates = (tables.Rates * max(1, count))()
        self._reach = ctypes.c_double(0.0)
        self._dtypes = (ctypes.c_int64 * max(1, count))(*(DTYPES[p.dtype] for p in parameters))
        self._lengths = (ctypes.c_int64 * max(1, count))(*(p.numel() for p in parameters))
        recipes = [self._recipe(one, cycles) for one in careful]
        layout = Layout(recipes[0].layout.num_scales, (), (), (), ())
        nothing = Recipe(layout, (), (), recipes[0].p, 1.0, 1, False)
        self._fastest = [max([0.0, *(e.rate for e in r.layout.entries)]) for r in recipes]
        packers = [Packer(recipe, self._threads) for recipe in (nothing, *recipes)]
        self._packed = [packer.pack() for packer in packers]
        self._updates = [
            self._update_table(packer, packed)
            for packer, packed in zip(packers, self._packed, strict=True)
        ]
        self._orders = [self._order(packer) for packer in packers]
        # Factors alone: no pass updates anything, and there is no rest.
        self._still = [self._quiet_order(packer) for packer in packers]
        self._keep += packers

    def _recipe(self, careful: CarefulStep, cycles: int) -> Recipe:
        """Of what a turn moves."""
        careful.bind_()
        known = careful.collect((self._optimizer,), None, gradients=False)
        return careful.recipe(known, cycles)

    def _update_table(self, packer: Packer, packed: Any) -> Any:
        """Every parameter with its buffers, and the factors that one turn leaves to it."""
        size = ctypes.sizeof(tables.Scaler)
        scalers = {
            self._at(packer.recipe.weights[write.entry]): row["scaler"]
            for write, row in zip(packer.recipe.writes, packer.rows.writes, strict=True)
            if write.exponent == 1
        }
        rows: list[dict[str, Any]] = []
        memory = self._memory
        for number, (parameter, buffers) in enumerate(
            zip(memory.parameters, memory.buffers, strict=True)
        ):
            kind = memory.kind(number)
            places = dict(
                zip(("first", "second", "third"), (b.data_ptr() for b in buffers), strict=False)
            )
            rows.append({
                "weight": parameter.data_ptr(), **places, "dtype": DTYPES[parameter.dtype],
                "kind": kind, "size": parameter.numel(), "width": parameter.numel(),
            })  # fmt: skip
        for number, scaler in scalers.items():
            form = packer.forms[packer.rows.scalers[scaler]["form"]]
            rows[number] |= {
                "width": form.cols * form.run, "factors": packed.scalers + scaler * size
            }  # fmt: skip
        return self._held_table(tables.Update, rows)

    def _at(self, weight: Tensor) -> int:
        """The number of the parameter whose memory this is."""
        return self._numbers[weight.data_ptr()]

    def _order(self, packer: Packer) -> tuple[int, int, int, int]:
        """Which pass updates what, what is left to do before, and which cells are summed there."""
        blocks, entries = packer.recipe.layout.blocks, packer.recipe.weights
        of_pass, summed = [-1] * len(packer.rows.passes), [0] * len(blocks)
        done: set[int] = set()
        for k, row in enumerate(packer.rows.passes):
            number = self._at(entries[blocks[row["block"]].entry])
            if (
                row["first"]
                and packer.rows.blocks[row["block"]]["sums"] is None
                and number not in done
            ):
                of_pass[k] = number
                done.add(number)
        with_cells = {
            self._at(entries[block.entry]): k
            for k, block in enumerate(blocks)
            if block.picked is None and packer.rows.blocks[k]["sums"] is not None
        }
        rest = []
        for number in range(len(self._memory.parameters)):
            if number not in done:
                block = with_cells.get(number, -1)
                rest.append({"update": number, "block": block})
                if block >= 0:
                    summed[block] = 1
        return (
            self._ints(of_pass), self._held_table(tables.Rest, rest), len(rest), self._ints(summed)
        )  # fmt: skip

    def _quiet_order(self, packer: Packer) -> tuple[int, int, int, int]:
        passes, blocks = len(packer.rows.passes), len(packer.recipe.layout.blocks)
        nothing = self._held_table(tables.Rest, [])
        return self._ints([-1] * passes), nothing, 0, self._ints([0] * blocks)

    def _held_table(self, struct: type[ctypes.Structure], rows: list[dict[str, Any]]) -> int:
        table = (struct * max(1, len(rows)))(*(struct(**row) for row in rows))
        self._keep.append(table)
        return ctypes.addressof(table)

    def _ints(self, values: list[int]) -> int:
        table = (ctypes.c_int64 * max(1, len(values)))(*values)
        self._keep.append(table)
        return ctypes.addressof(table)

    # ---- run

    def step_(self, due: int | None, turn: int | None) -> bool:
        """Factors of `due`, the optimizer's step, factors of `turn`. False: nothing was written,
        and the step is one for torch operations.

        Raises NonFiniteError, with nothing written.
        """
        memory = self._memory
        pointers = memory.gradients()
        if pointers is None:
            return False
        if memory.look_():
            self._found = None
        reach = 1.0
        if due is not None:
            if self._found != due and not self._find(due):
                return False
            reach = reach_of(self._fastest[due] * self._reach.value)
        self._gradients[: len(pointers)] = list(pointers)
        gradient = self._library.enorm_largest(
            self._gradients, self._dtypes, self._lengths, len(pointers), threads_now(self._threads)
        )
        if not math.isfinite(gradient):
            gradient = check_gradients(memory.held)
        bounds = memory.admitted(self._rows(pointers), gradient, reach)
        if bounds is None:
            return False
        decided = self._call(due, turn, self._orders)
        self._found = turn if decided and turn is not None else None
        memory.written_(pointers, bounds)
        return True

    def _find(self, turn: int) -> bool:
        """The factors of a turn, from the weights as they are."""
        self._found = turn if self._call(None, turn, self._still) else None
        return self._found is not None

    def _rows(self, pointers: Sequence[int | None]) -> list[Stepping]:
        """Fill in what the optimizer does; each group and number of a step, once."""
        numbers, stepping = self._memory.steps(pointers)
        if numbers != self._numbered:
            self._rates_of[: len(numbers)] = numbers  # type: ignore[assignment]
            self._numbered = numbers
        for row, (group, count) in enumerate(stepping):
            self._rates[row] = tables.Rates(*numbers_of(rates_of(self._optimizer, group, count)))
        return stepping

    def _call(self, due: int | None, turn: int | None, orders: Any) -> bool:
        number = 0 if turn is None else turn + 1
        of_pass, rest, rest_count, summed = orders[number]
        fused = tables.Fused(
            updates=self._updates[0 if due is None else due + 1],
            gradients=ctypes.addressof(self._gradients),
            rates=ctypes.addressof(self._rates),
            rates_of=ctypes.addressof(self._rates_of),
            of_pass=of_pass,
            rest=rest,
            rest_count=rest_count,
            summed=summed,
            reach=ctypes.addressof(self._reach),
        )
        return bool(
            self._library.enorm_fused(
                ctypes.byref(self._packed[number]), ctypes.byref(fused), threads_now(self._threads)
            )
        )


def _is_plain_number(counter: Tensor) -> bool:
    """Whether a counter is one number in memory that native code can write to."""
    plain = type(counter) is Tensor and counter.layout == torch.strided and counter.is_cpu
    if not plain or counter.dtype not in (torch.float32, torch.float64) or counter.numel() != 1:
        return False
    end = (counter.storage_offset() + 1) * counter.element_size()
    return counter.untyped_storage().nbytes() >= end
