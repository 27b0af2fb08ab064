"""A step compiled for the memory as it is now, and compiled anew when that changes; and one that is
not compiled, which goes to the optimum."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from enorm_fx.step.backends import compile_step
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.factors import FactoredWrite
from enorm_fx.step.guard import Guard, structure_of
from enorm_fx.step.notes import Notes
from enorm_fx.step.optimizer_state import exponents
from enorm_fx.step.optimum import to_optimum_
from enorm_fx.step.recipe import BackendStep, Recipe

_IN_PARTS = "weights lie in parts on several processes: each step is measured, reduced and solved\n"
_MOMENTS = "the optimizer keeps means of rows and of columns: each step is measured and solved\n"
_NEAR_ENOUGH = 1e-8  # the gap at which a step that converges stops: the rounding of float32


class StepRunner:
    """Runs a step by a backend, and the careful way where the backend refuses.

    deferred: do not wait for the device after a step; if the step refused, the next one is made
    the careful way, which says what is wrong.
    """

    def __init__(
        self,
        careful: CarefulStep,
        optimizers: Sequence[Optimizer],
        buffers: Mapping[str, int],
        *,
        cycles: int,
        backend: str,
        deferred: bool,
        notes: Notes,
    ) -> None:
        self._careful, self._optimizers, self._buffers = careful, optimizers, dict(buffers)
        self._cycles, self._wanted, self._deferred = cycles, backend, deferred
        self._notes = notes
        careful.bind_()
        self._structure = structure_of(careful.model, careful.names)
        self._guard: Guard | None = None
        self._backend = self._why = ""
        self._recipe: Recipe | None = None
        self._compiled: BackendStep | None = None
        self._versioned: list[Tensor] = []
        self._unread: Tensor | None = None
        self._turn = threading.Lock()

    @property
    def backend(self) -> str:
        """The backend that runs it; compiles it if need be."""
        self._compile_if_needed()
        return self._backend

    @property
    def code(self) -> str:
        """The step as tensor operations, for people; compiles it if need be."""
        self._compile_if_needed()
        return self._why if self._compiled is None else self._compiled.code

    def check(self) -> None:
        """Raises PlanError if the model is no longer the one that was analyzed."""
        self._careful.together(lambda: self._structure.check(self._careful.model))

    def run_(self) -> None:
        """One step. Raises what `CarefulStep.apply_` raises, with nothing written.

        One at a time: native code runs while other threads of Python do, and a step has one
        workspace.
        """
        with self._turn:
            self._run_()

    def _run_(self) -> None:
        self._compile_if_needed()
        compiled, recipe = self._compiled, self._recipe
        if compiled is None or recipe is None:
            self._careful.run_(self._optimizers, self._buffers, self._cycles)
            return
        if not recipe.writes:
            return
        if self._refused_before() or not self._succeeded(compiled.run()):
            self._careful.run_(self._optimizers, self._buffers, self._cycles)
            return
        # Memory may have been written behind autograd's back: a graph that needs it must notice.
        torch.autograd.graph.increment_version(self._versioned)

    def _compile_if_needed(self) -> None:
        """Without a result where weights lie in parts, or an optimizer keeps means of rows and of
        columns: then each step is made the careful way."""
        if self._compiled is None or not (self._guard and self._guard.holds()):
            self._guard = self._compiled = self._recipe = None
            self._careful.together(self._bind_)
            if self._careful.sharded:
                self._take("distributed", _IN_PARTS)
                return
            writes = self._careful.collect(self._optimizers, self._buffers, gradients=False)
            if any(isinstance(write, FactoredWrite) for write in writes):
                self._take("eager", _MOMENTS)
                return
            self._recipe = self._careful.recipe(writes, self._cycles)
            backend, self._compiled = compile_step(self._recipe, self._wanted)
            self._take(backend)
            self._versioned = [
                w.tensor for w in writes if w.exponent == 1 and not w.tensor.is_inference()
            ]
            known = {
                optimizer: [
                    name
                    for name, exponent in exponents(optimizer, self._buffers).items()
                    if exponent
                ]
                for optimizer in self._optimizers
            }
            natively = backend == "native"
            self._guard = Guard(self._careful.model, self._careful.names, known, natively)

    def _take(self, backend: str, why: str = "") -> None:
        self._backend, self._why = backend, why
        self._notes.backend(backend, why)

    def _bind_(self) -> None:
        self._structure.check(self._careful.model)
        self._careful.bind_()

    def _refused_before(self) -> bool:
        unread, self._unread = self._unread, None
        refused = unread is not None and not bool(unread)
        if refused:
            self._notes.refused("with check='async' the one before changed nothing, silently")
        return refused

    def _succeeded(self, ok: Tensor | bool) -> bool:
        if self._deferred and isinstance(ok, Tensor):
            self._unread = ok.clone()  # a replayed graph writes its answer to the same place
            return True
        return bool(ok)


class ConvergingRunner:
    """Runs a step that goes to the optimum of the moment, the careful way, each time.

    How many cycles that takes is known only when the weights are, so nothing is compiled.
    """

    backend = "eager"
    code = inspect.getsource(to_optimum_)

    def __init__(
        self,
        careful: CarefulStep,
        optimizers: Sequence[Optimizer],
        buffers: Mapping[str, int],
        *,
        exact: bool,
    ) -> None:
        self._careful, self._optimizers, self._buffers = careful, optimizers, dict(buffers)
        self._exact = exact
        careful.bind_()
        self._structure = structure_of(careful.model, careful.names)
        self._turn = threading.Lock()

    def check(self) -> None:
        """Raises PlanError if the model is no longer the one that was analyzed."""
        self._careful.together(lambda: self._structure.check(self._careful.model))

    def run_(self) -> None:
        """One step. Raises what `CarefulStep.apply_` raises, with nothing written."""
        with self._turn:
            self.check()
            to_optimum_(
                self._careful,
                self._optimizers,
                self._buffers,
                tol=_NEAR_ENOUGH,
                exact=self._exact,
                gradients=False,
                polish=False,
            )
