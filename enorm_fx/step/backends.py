"""How a recipe is run: by generated tensor operations, by native code, by a CUDA graph.

A new backend is a function that makes a `BackendStep` of a recipe, and a line in `MAKERS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from enorm_fx.step.generated.generate import Eager, generate
from enorm_fx.step.native.backend import make_native
from enorm_fx.step.native.compiler import CompilerError
from enorm_fx.step.native.pack import Unsupported
from enorm_fx.step.recipe import BackendStep, Recipe

CHECKS = ("sync", "async")
_warned: set[str] = set()


def compile_step(recipe: Recipe, backend: str) -> tuple[str, BackendStep]:
    """The name of the backend that was taken, and the step.

    "auto": native on the CPU, cudagraph on one CUDA device, else eager. A backend that this
    machine or this recipe does not admit gives way to eager, with one warning.
    """
    if backend == "auto":
        backend = _best_for({write.tensor.device for write in recipe.writes})
    try:
        return backend, MAKERS[backend](recipe)
    except (CompilerError, Unsupported) as error:
        warn_once(backend, error)
    return "eager", generate(recipe)


def _best_for(devices: set[torch.device]) -> str:
    kinds = {device.type for device in devices}
    if kinds <= {"cpu"}:
        return "native"
    return "cudagraph" if kinds == {"cuda"} and len(devices) == 1 else "eager"


def warn_once(backend: str, reason: Exception) -> None:
    """Say why a backend is not taken, once in a process."""
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
            warn_once("cudagraph", error)
            self._run = self._step.run
            return self._run()

        def replay() -> Tensor:
            graph.replay()
            return ok

        self._run = replay
        return replay()


def _make_cudagraph(recipe: Recipe) -> Replayed:
    devices = {write.tensor.device for write in recipe.writes}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise Unsupported("the tensors do not all lie on one CUDA device")
    return Replayed(generate(recipe))


# A maker raises CompilerError or Unsupported where it cannot serve.
MAKERS: Mapping[str, Callable[[Recipe], BackendStep]] = {
    "eager": generate,
    "native": make_native,
    "cudagraph": _make_cudagraph,
}
# "triton" makes no step of its own, only one with an optimizer's: see `enorm_fx.step.fused`.
BACKENDS = ("auto", *MAKERS, "triton")
