"""One step of an optimizer with the rescaling of the step before: native, by a kernel on a GPU, or
in torch operations.

State is at all times one network's: after a step the weights and buffers are those that the
optimizer has written, and what is due is to find the factors of their rescaling and to multiply by
them. Both are done in the next step, where the gradient takes the inverse factors. Factors are a
function of the weights alone, so those that were found in advance are no more than a shortcut.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from enorm_fx.errors import ArgumentError, NonFiniteError
from enorm_fx.step.backends import warn_once
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.fused.held import (
    Held,
    bounds_after,
    check_gradients,
    check_held,
    held_by,
    limits_of,
    reach_of,
    steps_of,
)
from enorm_fx.step.fused.native import NativeFused
from enorm_fx.step.fused.optimizers import Sizes, is_scaled
from enorm_fx.step.fused.triton_step import TritonFused
from enorm_fx.step.generated.generate import generate
from enorm_fx.step.guard import structure_of
from enorm_fx.step.native.compiler import CompilerError
from enorm_fx.step.native.pack import Unsupported
from enorm_fx.step.notes import Notes
from enorm_fx.step.precision import full_precision

Plain = Callable[[], None]


class FusedStep:
    """careful: by turn, what finds the factors. due: the turn whose factors are to be found from
    the weights and to be applied; None: none are."""

    def __init__(
        self,
        careful: Sequence[CarefulStep],
        optimizer: Optimizer,
        buffers: Mapping[str, int],
        *,
        cycles: int,
        p: float,
        backend: str,
        notes: Notes,
    ) -> None:
        self._careful, self.optimizer, self._buffers = tuple(careful), optimizer, dict(buffers)
        self._cycles, self._p, self._wanted = cycles, p, backend
        self._notes = notes
        self._tables: NativeFused | TritonFused | None = None
        for one in self._careful:
            one.bind_()
            if one.sharded:
                raise ArgumentError(
                    "fused=True does not take weights that lie in parts on several processes: use "
                    "fused=False"
                )
        self._model = self._careful[0].model
        moved = {name for one in self._careful for name in one.names}
        self._structure = structure_of(self._model, sorted(moved))
        self.turns = len(self._careful)
        self.due: int | None = None
        self._turn = threading.Lock()

    @property
    def backend(self) -> str:
        """Who makes the next step, as far as can be said before its gradients are there."""
        tables = self._tables_now()
        return "eager" if tables is None else tables.name

    @property
    def code(self) -> str:
        """The rescaling as torch operations, as if it followed the optimizer's step at once."""
        careful = self._careful[self.due or 0]
        careful.bind_()
        writes = careful.collect((self.optimizer,), self._buffers, gradients=False)
        return generate(careful.recipe(writes, self._cycles)).code

    def check(self) -> None:
        """Raises PlanError if the model is no longer the one that was analyzed."""
        self._structure.check(self._model)

    def run_(self, plain: Plain, turn: int | None, start: Plain | None) -> None:
        """A step of the optimizer, after the rescaling that is due; then `turn` is due.

        plain: the optimizer's own step. start: what comes before the first step.

        Raises NonFiniteError, OptimizerStateError or PlanError, with nothing written.
        """
        with self._turn:
            fast = start is None and not is_scaled(self.optimizer)
            tables = self._tables_now() if fast else None
            if fast and tables is None:
                self._notes.backend("eager")
            if tables is not None and tables.step_(self.due, turn):
                self.due = turn
            else:
                self._run_eager_(plain, turn, start)

    def flush_(self) -> None:
        """Do the rescaling that is due now, on weights, buffers and gradients. Raises as above."""
        with self._turn:
            self.check()
            if self.due is not None:
                self._rescaling(self.due)[1]()
                self.due = None

    def _run_eager_(self, plain: Plain, turn: int | None, start: Plain | None) -> None:
        self.check()
        held = self._held()
        gradient, sizes = check_gradients(held), check_held(held, self.optimizer)
        if start is not None:
            start()
            gradient, sizes = check_gradients(held), check_held(held, self.optimizer)
        due, (reach, rescale_) = self.due, self._rescaling(self.due)
        undo = None
        if not self._is_sure(held, sizes, gradient, reach):
            # It may still be finite. So it is tried, on a copy that can be put back.
            undo = Undo(held, self.optimizer)
        try:
            rescale_()
            self.due = None
            plain()
            self.due = turn
            if undo is not None:
                self._check_after()
        except BaseException:
            if undo is not None:
                undo.restore_()
                self.due = due
            raise

    def _held(self) -> list[Held]:
        return held_by(self._model, self._structure.moved, self.optimizer)

    def _rescaling(self, turn: int | None) -> tuple[float, Plain]:
        """The largest factor, and what multiplies by the factors of a turn, gradients too."""
        if turn is None:
            return 1.0, lambda: None
        careful = self._careful[turn]
        careful.bind_()
        u, sizes = careful.solve(self._cycles)
        writes = careful.collect((self.optimizer,), self._buffers, gradients=True)
        reach = reach_of(careful.fastest * float(u.abs().amax()))

        def rescale_() -> None:
            with full_precision(careful.device):
                careful.apply_(u, sizes, writes)

        return reach, rescale_

    def _is_sure(self, held: list[Held], sizes: Sizes, gradient: float, reach: float) -> bool:
        """Whether no number of this step can leave its range."""
        limits = limits_of(held, self._p)
        stepping = {
            (id(h.group), step): (h.group, step)
            for h, step in zip(held, steps_of(held, self.optimizer), strict=True)
            if h.group is not None
        }
        found = bounds_after(self.optimizer, stepping.values(), sizes, gradient, reach, limits.tiny)
        return limits.admit(*found)

    def _check_after(self) -> None:
        """Raises NonFiniteError if the step has left something that no step could follow."""
        try:
            check_held(self._held(), self.optimizer)
            if self.due is not None:
                careful = self._careful[self.due]
                careful.bind_()
                careful.edits(*careful.solve(self._cycles))
        except NonFiniteError as error:
            raise NonFiniteError(f"after this step {error}") from error

    def _tables_now(self) -> NativeFused | TritonFused | None:
        """The tables for the memory as it is; None where torch operations make the step."""
        if self._wanted == "eager":
            return None
        if self._tables is not None and self._tables.holds():
            return self._tables
        self._tables = None
        self.check()
        held = self._held()
        if self._wanted == "auto" and any(h.parameter.device.type != "cpu" for h in held):
            return None
        made = TritonFused if self._wanted == "triton" else NativeFused
        try:
            if self._buffers:
                raise Unsupported("buffers= was given")
            self._tables = made(self._careful, held, self.optimizer, self._cycles, self._p)
            self._notes.backend(made.name)
        except (CompilerError, Unsupported) as error:
            warn_once(made.name, error)
        return self._tables


class Undo:
    """A copy of all that a step writes."""

    def __init__(self, held: Sequence[Held], optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._states: list[tuple[Tensor, dict[str, Any] | None]] = []
        for h in held:
            self._keep(h.parameter.detach())
            if h.parameter.grad is not None:
                self._keep(h.parameter.grad.detach())
            state = optimizer.state.get(h.parameter)
            self._states.append((h.parameter, None if state is None else dict(state)))
            for value in (state or {}).values():
                if isinstance(value, Tensor):
                    self._keep(value)

    def _keep(self, tensor: Tensor) -> None:
        self._tensors.append((tensor, tensor.clone()))

    def restore_(self) -> None:
        for tensor, copy in self._tensors:
            tensor.copy_(copy)
        for parameter, state in self._states:
            if state is None:
                self.optimizer.state.pop(parameter, None)
            else:
                held = self.optimizer.state[parameter]
                held.clear()
                held.update(state)
