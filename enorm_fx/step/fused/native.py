"""The same step by one call of C++: tables of what is updated, around those of the rescaling."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from operator import attrgetter, ge, is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.factors import Write
from enorm_fx.step.fused.held import (
    Held,
    bounds_after,
    buffers_of,
    check_gradients,
    check_held,
    limits_of,
    reach_of,
    steps_of,
)
from enorm_fx.step.fused.optimizers import BUFFERS, PLAIN, Sizes, kind_of, rates_of
from enorm_fx.step.guard import Guard
from enorm_fx.step.layout import Layout
from enorm_fx.step.matrix_view import memory_order
from enorm_fx.step.native import tables
from enorm_fx.step.native.backend import threads_now
from enorm_fx.step.native.compiler import load
from enorm_fx.step.native.pack import DTYPES, Packer, Unsupported, threads_for
from enorm_fx.step.recipe import Recipe


class NativeFused:
    """Tables for the memory as it is now; `holds` says whether it still is.

    Raises CompilerError or Unsupported where it cannot serve.
    """

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
        self._held = [h for h in held if h.parameter.numel()]
        self._groups = list(optimizer.param_groups)
        self._listed = _listed(optimizer)
        self._kinds = [kind_of(optimizer, group) for group in self._groups]
        self._limits = limits_of(self._held, p)
        self._buffers = [_expected(h, optimizer) for h in self._held]
        self._check_memory()
        names = {id(q): name for name, q in careful[0].model.named_parameters()}
        if any(id(h.parameter) not in names for h in self._held):
            raise Unsupported("the optimizer holds parameters that the model does not have")
        self._guard = Guard(
            careful[0].model,
            [names[id(h.parameter)] for h in self._held],
            {optimizer: sorted({"step", *(name for group in BUFFERS for name in group)})},
        )
        self._parameters = [h.parameter for h in self._held]
        self._numbers = {p.data_ptr(): k for k, p in enumerate(self._parameters)}
        of_group = {id(group): k for k, group in enumerate(self._groups)}
        self._group_of = [-1 if h.group is None else of_group[id(h.group)] for h in self._held]
        self._stepping = [self._may_step(k) for k in range(len(self._held))]
        self._shapes = [(p.dtype, p.stride()) for p in self._parameters]
        self._make_tables(careful, cycles)
        self._counters = [optimizer.state.get(q, {}).get("step") for q in self._parameters]
        self._written = [*self._parameters, *(b for found in self._buffers for b in found)]
        self._versioned = [*self._written, *(c for c in self._counters if c is not None)]
        self._versions: list[int] = []
        self._counts: list[float] = []
        self._numbered: list[int] = []
        self._usual = _Usual(self._parameters, all(self._stepping))
        self._sizes: Sizes | None = None
        self._found: int | None = None

    # ---- may it run?

    def holds(self) -> bool:
        """True: every tensor is the one it was, at its place, and the optimizer does the same."""
        groups = self._optimizer.param_groups
        return (
            len(groups) == len(self._groups)
            and all(map(is_, groups, self._groups))
            and [kind_of(self._optimizer, group) for group in groups] == self._kinds
            and len(listed := _listed(self._optimizer)) == len(self._listed)
            and all(map(is_, listed, self._listed))
            and self._guard.holds()
        )

    def _check_memory(self) -> None:
        for h, buffers in zip(self._held, self._buffers, strict=True):
            parameter = h.parameter
            step = self._optimizer.state.get(parameter, {}).get("step")
            counted = len(buffers) > 1 or step is not None  # Adam counts, SGD does not
            if counted and not isinstance(step, Tensor):
                raise Unsupported(f"the step of '{h.name}' is no tensor")
            if parameter.device.type != "cpu" or parameter.dtype not in _DTYPES:
                raise Unsupported(f"'{h.name}' is {parameter.dtype} on {parameter.device}")
            axes = memory_order(parameter)
            if axes is None:
                raise Unsupported(f"'{h.name}' has gaps in its memory")
            for tensor in buffers:
                if tensor.dtype != parameter.dtype or memory_order(tensor) != axes:
                    raise Unsupported(f"a buffer of '{h.name}' lies in memory in another way")
            if any(tensor.is_inference() for tensor in (parameter, *buffers)):
                raise Unsupported(f"'{h.name}' keeps no count of what is written to it")
        places = sorted(
            (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())
            for h, buffers in zip(self._held, self._buffers, strict=True)
            for t in (h.parameter, *buffers)
        )
        if any(end > begin for (_, end), (begin, _) in itertools.pairwise(places)):
            raise Unsupported("parameters or buffers share memory")

    def _may_step(self, number: int) -> bool:
        """Whether all buffers that a step needs are there."""
        group = self._group_of[number]
        return group >= 0 and len(self._buffers[number]) == len(BUFFERS[self._kinds[group]])

    def _pointers(self) -> Sequence[int | None] | None:
        """Where gradients lie; None where one must be looked at with more care."""
        gradients: list[Any] = [p.grad for p in self._parameters]
        # The usual case, all at once: every parameter steps, on a gradient that lies as it does.
        if self._usual.fits(gradients):
            return list(map(Tensor.data_ptr, gradients))
        found: list[int | None] = []
        for number, parameter in enumerate(self._parameters):
            gradient = parameter.grad if self._group_of[number] >= 0 else None
            if gradient is None:
                found.append(None)
                continue
            dtype, stride = self._shapes[number]
            plain = type(gradient) is Tensor and gradient.layout == torch.strided
            if not (self._stepping[number] and plain and gradient.dtype == dtype):
                return None
            if gradient.stride() != stride and memory_order(gradient) != memory_order(parameter):
                return None
            needed = (gradient.storage_offset() + gradient.numel()) * gradient.element_size()
            if gradient.untyped_storage().nbytes() < needed:
                return None
            found.append(gradient.data_ptr())
        return found

    # ---- tables

    def _make_tables(self, careful: Sequence[CarefulStep], cycles: int) -> None:
        self._keep: list[Any] = []
        count = len(self._held)
        written = sum(
            p.numel() * (2 + len(b)) for p, b in zip(self._parameters, self._buffers, strict=True)
        )
        self._threads = threads_for(written)
        self._gradients = (ctypes.c_void_p * max(1, count))()
        self._rates_of = (ctypes.c_int64 * max(1, count))()
        self._rates = (tables.Rates * max(1, count))()
        self._reach = ctypes.c_double(0.0)
        self._dtypes = (ctypes.c_int64 * max(1, count))(
            *(DTYPES[p.dtype] for p in self._parameters)
        )
        self._lengths = (ctypes.c_int64 * max(1, count))(*(p.numel() for p in self._parameters))
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
        """Of what a turn moves; the weight stands for its gradient, which takes the inverse."""
        careful.bind_()
        known = careful.collect((self._optimizer,), None, gradients=False)
        inverse = [Write(w.entry, w.tensor, -1) for w in known if w.exponent == 1]
        return careful.recipe([*known, *inverse], cycles)

    def _update_table(self, packer: Packer, packed: Any) -> Any:
        """Every parameter with its buffers, and the factors that one turn leaves to it."""
        scalers: dict[int, dict[int, int]] = {}
        size = ctypes.sizeof(tables.Scaler)
        for write, row in zip(packer.recipe.writes, packer.rows.writes, strict=True):
            scalers.setdefault(write.entry, {})[write.exponent] = row["scaler"]
        entries = {entry: self._at(packer.recipe.weights[entry]) for entry in scalers}
        rows: list[dict[str, Any]] = []
        for number, (parameter, buffers) in enumerate(
            zip(self._parameters, self._buffers, strict=True)
        ):
            group = self._group_of[number]
            kind = self._kinds[group] if self._stepping[number] else _kind_with(len(buffers))
            places = dict(
                zip(("first", "second", "third"), (b.data_ptr() for b in buffers), strict=False)
            )
            rows.append({
                "weight": parameter.data_ptr(), **places, "dtype": DTYPES[parameter.dtype],
                "kind": kind, "size": parameter.numel(), "width": parameter.numel(),
            })  # fmt: skip
        for entry, number in entries.items():
            up, down = scalers[entry][1], scalers[entry][-1]
            form = packer.forms[packer.rows.scalers[up]["form"]]
            rows[number] |= {
                "width": form.cols * form.run,
                "up": packed.scalers + up * size,
                "down": packed.scalers + down * size,
            }
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
        for number in range(len(self._parameters)):
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
        pointers = self._pointers()
        if pointers is None:
            return False
        if self._versions != list(map(_version, self._versioned)):
            self._sizes = self._found = None
            self._counts = steps_of(self._held, self._optimizer)
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
            gradient = check_gradients(self._held)
        bounds = self._admitted(self._rows(pointers), gradient, reach)
        if bounds is None:
            return False
        decided = self._call(due, turn, self._orders)
        self._found = turn if decided and turn is not None else None
        self._sizes = bounds
        self._written_(pointers)
        return True

    def _find(self, turn: int) -> bool:
        """The factors of a turn, from the weights as they are."""
        self._found = turn if self._call(None, turn, self._still) else None
        return self._found is not None

    def _rows(self, pointers: Sequence[int | None]) -> list[tuple[dict[str, Any], float]]:
        """Fill in what the optimizer does; each group and number of a step, once."""
        rows: dict[tuple[int, float], int] = {}
        numbers = [
            0 if pointer is None else rows.setdefault((group, count), len(rows))
            for pointer, group, count in zip(pointers, self._group_of, self._counts, strict=True)
        ]
        if numbers != self._numbered:
            self._rates_of[: len(numbers)] = numbers  # type: ignore[assignment]
            self._numbered = numbers
        stepping = [(self._groups[group], count) for group, count in rows]
        for row, (group, count) in enumerate(stepping):
            self._rates[row] = tables.Rates(*astuple(rates_of(self._optimizer, group, count)))
        return stepping

    def _admitted(
        self, stepping: list[tuple[dict[str, Any], float]], gradient: float, reach: float
    ) -> Sizes | None:
        """Bounds after the step, from those before: measured where these say too little."""
        for _ in range(2):
            measured = self._sizes is None
            sizes = check_held(self._held, self._optimizer) if self._sizes is None else self._sizes
            found, way = bounds_after(
                self._optimizer, stepping, sizes, gradient, reach, self._limits.tiny
            )
            if self._limits.admit(found, way):
                return found
            if measured:
                return None
            self._sizes = None
        return None

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

    def _written_(self, pointers: Sequence[int | None]) -> None:
        """Count the step where torch would, and remember what is written."""
        torch.autograd.graph.increment_version(self._written)
        made = [pointer is not None for pointer in pointers]
        self._counts = [count + one for count, one in zip(self._counts, made, strict=True)]
        counters = itertools.compress(self._counters, made)
        stepped = [counter for counter in counters if counter is not None]
        if stepped:
            torch._foreach_add_(stepped, 1)
        self._versions = list(map(_version, self._versioned))


class _Usual:
    """Gradients as they usually are: plain tensors that lie in memory as their parameters do."""

    def __init__(self, parameters: Sequence[Tensor], all_step: bool) -> None:
        self._all_step = all_step
        self._types = [Tensor] * len(parameters)
        self._layouts = [torch.strided] * len(parameters)
        self._strides = [p.stride() for p in parameters]
        self._dtypes = [p.dtype for p in parameters]
        self._bytes = [p.numel() * p.element_size() for p in parameters]

    def fits(self, gradients: list[Any]) -> bool:
        """By `map`: a loop over a hundred parameters takes longer than a step of small ones."""
        return (
            self._all_step
            and list(map(type, gradients)) == self._types
            and list(map(_layout, gradients)) == self._layouts
            and list(map(Tensor.stride, gradients)) == self._strides
            and list(map(_dtype, gradients)) == self._dtypes
            and not any(map(Tensor.storage_offset, gradients))
            and all(map(ge, map(_nbytes, map(Tensor.untyped_storage, gradients)), self._bytes))
        )


_version, _layout, _dtype = attrgetter("_version"), attrgetter("layout"), attrgetter("dtype")
_nbytes = torch.UntypedStorage.nbytes
_DTYPES = (torch.float32, torch.float64)


def _kind_with(buffers: int) -> int:
    """A kind that has so many buffers: what makes no step has them rescaled."""
    return next((kind for kind, names in enumerate(BUFFERS) if len(names) == buffers), PLAIN)


def _listed(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _expected(held: Held, optimizer: Optimizer) -> tuple[Tensor, ...]:
    """The buffers of a parameter, in their order; all that its kind has, or none."""
    found = buffers_of(held, optimizer)
    if not found:
        return ()
    names = BUFFERS[kind_of(optimizer, held.group)] if held.group is not None else ()
    if set(found) != set(names):
        raise Unsupported(f"the state of '{held.name}' is not that of its optimizer's settings")
    return tuple(found[name] for name in names)
