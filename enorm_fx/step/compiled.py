"""A step compiled for the memory as it is now, and compiled anew when that changes."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from enorm_fx.step.backends import compile_step
from enorm_fx.step.bound import Bound, structure_of
from enorm_fx.step.job import Compiled, Job
from enorm_fx.step.optimizer_state import exponents
from enorm_fx.step.program import Program


class CompiledStep:
    """Runs a program by a backend, and the careful way where the backend refuses.

    deferred: do not wait for the device after a step; if the step refused, the next one is made
    the careful way, which says what is wrong.
    """

    def __init__(
        self,
        program: Program,
        optimizer: Optimizer | None,
        buffers: Mapping[str, int],
        *,
        cycles: int,
        backend: str,
        deferred: bool,
    ) -> None:
        self._program, self._optimizer, self._buffers = program, optimizer, dict(buffers)
        self._cycles, self._wanted, self._deferred = cycles, backend, deferred
        program.bind_()
        self._structure = structure_of(program.model, program.names)
        self._bound: Bound | None = None
        self._backend = ""
        self._job: Job | None = None
        self._compiled: Compiled | None = None
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
        return self._compile_if_needed()[0].code

    def run_(self) -> None:
        """One step. Raises what `Program.apply_` raises, with nothing written.

        One at a time: native code runs while other threads of Python do, and a step has one
        workspace.
        """
        with self._turn:
            self._run_()

    def _run_(self) -> None:
        compiled, job = self._compile_if_needed()
        if not job.writes:
            return
        if self._refused_before() or not self._succeeded(compiled.run()):
            self._program.run_(self._optimizer, self._buffers, self._cycles)
            return
        # Memory may have been written behind autograd's back: a graph that needs it must notice.
        torch.autograd.graph.increment_version(self._versioned)

    def _compile_if_needed(self) -> tuple[Compiled, Job]:
        if self._compiled is None or self._job is None or not (self._bound and self._bound.holds()):
            self._bound = None
            self._structure.check(self._program.model)
            self._program.bind_()
            writes = self._program.collect(self._optimizer, self._buffers, gradients=False)
            self._job = self._program.job(writes, self._cycles)
            self._backend, self._compiled = compile_step(self._job, self._wanted)
            self._versioned = [
                w.tensor for w in writes if w.exponent == 1 and not w.tensor.is_inference()
            ]
            known = exponents(self._optimizer, self._buffers) if self._optimizer else {}
            self._bound = Bound(
                self._program.model,
                self._program.names,
                self._optimizer,
                [name for name, exponent in known.items() if exponent],
            )
        return self._compiled, self._job

    def _refused_before(self) -> bool:
        unread, self._unread = self._unread, None
        return unread is not None and not bool(unread)

    def _succeeded(self, ok: Tensor | bool) -> bool:
        if self._deferred and isinstance(ok, Tensor):
            self._unread = ok.clone()  # a replayed graph writes its answer to the same place
            return True
        return bool(ok)
