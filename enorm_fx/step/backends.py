"""How a job is run: as generated tensor operations, as native code, as a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from enorm_fx.step.generated.generate import Eager, generate
from enorm_fx.step.job import Compiled, Job
from enorm_fx.step.native.backend import make_native
from enorm_fx.step.native.compiler import CompilerError
from enorm_fx.step.native.pack import Unsupported

BACKENDS = ("auto", "eager", "native", "cudagraph")
CHECKS = ("sync", "async")
_warned: set[str] = set()


def compile_step(job: Job, backend: str) -> tuple[str, Compiled]:
    """The name of the backend that was taken, and the step.

    "auto": native on the CPU, cudagraph on one CUDA device, else eager. A backend that this
    machine or this job does not admit gives way to eager, with one warning.
    """
    devices = {write.tensor.device for write in job.writes}
    if backend == "auto":
        kinds = {device.type for device in devices}
        backend = "native" if kinds <= {"cpu"} else "eager"
        if kinds == {"cuda"} and len(devices) == 1:
            backend = "cudagraph"
    if backend == "native":
        try:
            return "native", make_native(job)
        except (CompilerError, Unsupported) as error:
            _warn_once("native", error)
    if backend == "cudagraph":
        if len(devices) == 1 and next(iter(devices)).type == "cuda":
            return "cudagraph", Replayed(generate(job))
        _warn_once("cudagraph", ValueError("the tensors do not all lie on one CUDA device"))
    return "eager", generate(job)


def _warn_once(backend: str, reason: Exception) -> None:
    if backend not in _warned:
        _warned.add(backend)
        warnings.warn(
            f"ENorm runs with backend='eager', since '{backend}' cannot be used: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


class Replayed:
    """A generated step as one CUDA graph: run once as it is, then captured, then replayed."""

    def __init__(self, step: Eager) -> None:
        self._step = step
        self._run: Callable[[], Tensor] = self._warm_up

    @property
    def code(self) -> str:
        return self._step.code

    def run(self) -> Tensor:
        return self._run()

    def _warm_up(self) -> Tensor:
        # Libraries allocate their workspaces in the first call, which a capture does not allow.
        self._run = self._capture
        return self._step.run()

    def _capture(self) -> Tensor:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._step.device):
                torch.cuda.synchronize()
                # Other threads, such as those that pin memory, may go on meanwhile.
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    ok = self._step.run()
        except RuntimeError as error:
            _warn_once("cudagraph", error)
            self._run = self._step.run
            return self._run()

        def replay() -> Tensor:
            graph.replay()
            return ok

        self._run = replay
        return replay()
