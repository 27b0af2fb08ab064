"""The same step by one pass on a GPU: tables for the kernels of `triton_kernels.py`.

A generated step finds the factors, as one CUDA graph from the second time on, and leaves them where
the kernels read them. The device is waited for once in a step: for the largest entry of the
gradients, the largest factor, and whether the factors may be used.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from enorm_fx.step.backends import Replayed
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.fused.fixed_memory import FixedMemory, Stepping
from enorm_fx.step.fused.held import Held, check_gradients, reach_of
from enorm_fx.step.fused.optimizers import Rates, numbers_of, rates_of
from enorm_fx.step.generated.generate import generate_factors
from enorm_fx.step.generated.multiply import LineFactors
from enorm_fx.step.native.pack import Unsupported
from enorm_fx.step.recipe import BackendStep

_MOST_ENTRIES = 2**31 - 2**16  # entries are numbered by 32 bits
_ALIGN = 16  # bytes of the widest access to memory
_RATES = len(fields(Rates))


@dataclass(frozen=True, slots=True, eq=False)
class _Family:
    """Parameters that one launch of a kernel serves. tasks: int32 (tasks, 2)."""

    dtype: torch.dtype
    kind: int
    aligned: bool
    tasks: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """What finds the factors of a turn, and how far they reach.

    factors: kept, since a table has their addresses. reach: 0-dim, exp(power * max |u|). fastest:
    the most that max |u| counts for.
    """

    step: BackendStep
    factors: list[LineFactors]
    reach: Tensor
    power: float
    fastest: float


class TritonFused:
    """Tables for the memory as it is now; `holds` says whether it still is.

    Raises Unsupported where it cannot serve.
    """

    name = "triton"

    def __init__(
        self,
        careful: Sequence[CarefulStep],
        held: Iterable[Held],
        optimizer: Optimizer,
        cycles: int,
        p: float,
    ) -> None:
        self._kernels = _imported()
        self._optimizer = optimizer
        kind = "cpu" if self._kernels.INTERPRETED else "cuda"
        self._memory = memory = FixedMemory(careful[0].model, held, optimizer, p, kind, _adder)
        devices = {q.device for q in memory.parameters}
        if len(devices) != 1:
            raise Unsupported("the parameters do not all lie on one device")
        if max(q.numel() for q in memory.parameters) > _MOST_ENTRIES:
            raise Unsupported("more entries than 32 bits number")
        self._device = devices.pop()
        self._numbers = {q.data_ptr(): k for k, q in enumerate(memory.parameters)}
        self._turns: list[_Turn | None] = []
        self._tables = [self._table({})]
        for one in careful:
            self._add_turn(one, optimizer, cycles)
        self._families = self._grouped()
        count = len(memory.parameters)
        self._places, self._rates_of = self._ints([0] * count), self._ints([0] * count)
        self._rates = torch.ones(count, _RATES, dtype=torch.float64, device=self._device)
        self._sent: dict[str, list[Any]] = {}
        tasks = sum(len(family.tasks) for family in self._families)
        self._found = torch.zeros(tasks, dtype=torch.float64, device=self._device)
        self._try()

    def holds(self) -> bool:
        """True: the memory is what it was, and the optimizer does the same."""
        return self._memory.holds()

    # ---- tables

    def _add_turn(self, careful: CarefulStep, optimizer: Optimizer, cycles: int) -> None:
        careful.bind_()
        known = careful.collect((optimizer,), None, gradients=False)
        weights = [write for write in known if write.exponent == 1]
        if not weights:
            self._turns.append(None)
            self._tables.append(self._tables[0])
            return
        recipe = careful.recipe(weights, cycles)
        found = generate_factors(recipe)
        on_cuda = self._device.type == "cuda"
        step: BackendStep = Replayed(found.step) if on_cuda else found.step
        self._turns.append(_Turn(step, found.factors, found.reach, recipe.power, careful.fastest))
        numbers = [self._numbers[write.tensor.data_ptr()] for write in weights]
        self._tables.append(self._table(dict(zip(numbers, found.factors, strict=True))))

    def _table(self, factors: dict[int, LineFactors]) -> Tensor:
        """See `triton_kernels.py`. factors: by parameter."""
        table = []
        for number, (parameter, buffers) in enumerate(
            zip(self._memory.parameters, self._memory.buffers, strict=True)
        ):
            places = [b.data_ptr() for b in buffers] + [0] * (3 - len(buffers))
            size = parameter.numel()
            line = factors.get(number, LineFactors(size, None, None))
            lines = [0 if v is None else v.data_ptr() for v in (line.rows, line.cols)]
            table.append([parameter.data_ptr(), *places, size, line.width, *lines])
        return self._ints(table)

    def _grouped(self) -> list[_Family]:
        """The parameters by what a kernel is compiled for."""
        blocks: dict[tuple[torch.dtype, int, bool], list[list[int]]] = {}
        for number, (parameter, buffers) in enumerate(
            zip(self._memory.parameters, self._memory.buffers, strict=True)
        ):
            held = [parameter.numel(), *(t.data_ptr() for t in (parameter, *buffers))]
            key = parameter.dtype, self._memory.kind(number), not any(n % _ALIGN for n in held)
            count = -(-parameter.numel() // self._kernels.BLOCK)
            blocks.setdefault(key, []).extend([number, block] for block in range(count))
        return [
            _Family(*key, torch.tensor(tasks, dtype=torch.int32).to(self._device))
            for key, tasks in blocks.items()
        ]

    def _ints(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._device)

    def _try(self) -> None:
        """Run every kernel on nothing: what cannot be compiled must be known before one writes."""
        nothing = torch.zeros_like(self._tables[0])
        nothing[:, self._kernels.WIDTH] = 1
        try:
            for aligned in (True, False):
                for family in self._families:
                    self._look(family, family.tasks[:1], nothing, aligned, self._found)
                    self._update(family, family.tasks[:1], nothing, aligned)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        except (OSError, RuntimeError, subprocess.SubprocessError, self._kernels.ERROR) as error:
            raise Unsupported(f"its kernels do not run: {error}") from error

    # ---- run

    def step_(self, due: int | None, turn: int | None) -> bool:
        """Factors of `due` and the optimizer's step; `turn` may come whenever. False: nothing was
        written, and the step is one for torch operations.

        Raises NonFiniteError, with nothing written.
        """
        memory = self._memory
        places = memory.gradients()
        if places is None:
            return False
        memory.look_()
        aligned, stepping = self._send_(places)
        found = None if due is None else self._turns[due]
        gradient, reach = self._measured(found, aligned)
        if reach is None:
            return False
        if not math.isfinite(gradient):
            gradient = check_gradients(memory.held)
        bounds = memory.admitted(stepping, gradient, reach)
        if bounds is None:
            return False
        table = self._tables[0 if due is None else due + 1]
        for family in self._families:
            self._update(family, family.tasks, table, aligned)
        memory.written_(places, bounds)
        return True

    def _send_(self, places: Sequence[int | None]) -> tuple[bool, list[Stepping]]:
        """Bring to the device what changes from step to step; whether all gradients are aligned."""
        numbers, stepping = self._memory.steps(places)
        addresses = [place or 0 for place in places]
        rates = [numbers_of(rates_of(self._optimizer, group, count)) for group, count in stepping]
        self._copy_("places", self._places, addresses)
        self._copy_("rates_of", self._rates_of, numbers)
        self._copy_("rates", self._rates[: len(rates)], rates)
        return not any(address % _ALIGN for address in addresses), stepping

    def _copy_(self, name: str, target: Tensor, values: list[Any]) -> None:
        """Only what is new, and without waiting for the device."""
        if values and self._sent.get(name) != values:
            pinned = self._device.type == "cuda"
            source = torch.tensor(values, dtype=target.dtype, pin_memory=pinned)
            target.copy_(source, non_blocking=True)
            self._sent[name] = values

    def _measured(self, turn: _Turn | None, aligned: bool) -> tuple[float, float | None]:
        """The largest entry of any gradient, inf or NaN where one is not finite; what no factor and
        no inverse of one is larger than, None where factors must not be used."""
        start = 0
        for family in self._families:
            out = self._found[start : start + len(family.tasks)]
            self._look(family, family.tasks, self._tables[0], aligned, out)
            start += len(family.tasks)
        largest = self._found.amax()
        if turn is None:
            return float(largest), 1.0
        ok = torch.as_tensor(turn.step.run(), device=self._device)
        numbers = torch.stack([largest, turn.reach.double(), ok.double()])
        gradient, exponential, usable = numbers.tolist()
        if not usable:
            return gradient, None
        return gradient, reach_of(turn.fastest * math.log(exponential) / turn.power)

    def _look(
        self, family: _Family, tasks: Tensor, table: Tensor, aligned: bool, out: Tensor
    ) -> None:
        with self._here():
            self._kernels.largest_[len(tasks),](
                tasks, table, self._places, out, **self._constants(family, aligned)
            )

    def _update(self, family: _Family, tasks: Tensor, table: Tensor, aligned: bool) -> None:
        with self._here():
            self._kernels.update_[len(tasks),](
                tasks,
                table,
                self._places,
                self._rates_of,
                self._rates,
                KIND=family.kind,
                **self._constants(family, aligned),
            )

    def _constants(self, family: _Family, aligned: bool) -> dict[str, Any]:
        return {
            "W": self._kernels.DTYPES[family.dtype],
            "ALIGN": _ALIGN if family.aligned and aligned else 1,
            "BLOCK": self._kernels.BLOCK,
        }

    def _here(self) -> AbstractContextManager[Any]:
        """Kernels run on the device that is current."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()


def _adder(counters: Sequence[Tensor]) -> Callable[[], None]:
    def add() -> None:
        if counters:
            torch._foreach_add_(list(counters), 1)

    return add


def _imported() -> Any:
    try:
        from enorm_fx.step.fused import triton_kernels
    except ImportError as error:
        raise Unsupported(f"triton cannot be imported: {error}") from error
    return triton_kernels
