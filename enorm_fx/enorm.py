"""ENorm: keep a network's function and balance its weights, during training or once.

Stock, Graham, Gribonval, Jegou: Equi-normalization of Neural Networks, ICLR 2019, arXiv:1902.10416.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from enorm_fx.errors import ArgumentError
from enorm_fx.plan import Group, Plan
from enorm_fx.step.backends import BACKENDS, CHECKS
from enorm_fx.step.checks import (
    check_count,
    check_exact,
    check_finite,
    check_optimizer,
    check_settings,
)
from enorm_fx.step.coarse import Coarse, correct_, make_coarse, unbounded
from enorm_fx.step.compiled import CompiledStep
from enorm_fx.step.measure import objective
from enorm_fx.step.precision import full_precision
from enorm_fx.step.program import Program
from enorm_fx.step.solve import Descent, alive, imbalance, log_cost, sweep_

_MAX_CYCLES = 1000
_LOG_2 = math.log(2.0)


@dataclass(frozen=True, slots=True)
class Report:
    """What `balance` did.

    norm_before, norm_after: J, see `objective`.
    cycles:            descent cycles that were run.
    largest_log_scale: the largest |log d| over all scales.
    gap:               how far from the optimum it stopped (before rounding, with exact=True):
                       the largest |P - N| / (P + N) over channels, P and N what pulls a channel's
                       scale down and up in J; for p = inf, the same of the maxima. Larger than
                       tol if 1000 cycles did not reach it.
    """

    norm_before: float
    norm_after: float
    cycles: int
    largest_log_scale: float
    gap: float


class ENorm:
    """One balancing cycle after each optimizer step: the training method of the paper.

    Call `step` after `optimizer.step()`, or `attach` once. The network's function stays; weights,
    biases and the optimizer's buffers are multiplied in place, all or nothing. Gradients
    that lie in `.grad` are left alone: they are spent once the optimizer has stepped. Do not call
    `step` between `backward` and `optimizer.step()`, and clear gradients before the next
    `backward` (`rescale_` and `balance`, which may be called at any time, do scale them).

    plan_or_model: what `analyze` gave, or a model, which is analyzed with defaults.
    optimizer:     its buffers follow the weights; None where there is none, or it keeps none.
    c:             > 0; at the optimum of a chain a consumer's norm is c times its producer's.
    p:             >= 1, or inf: the norm that falls.
    cycles:        cycles per step, on norms that are measured once.
    every:         act on each every-th call of `step`.
    order:         "sequential": groups one after the other, each sees those before it.
                   "colored": groups that share no weight in one go; fewer and larger operations.
                   "simultaneous": all factors from the norms at the start of the cycle.
    last_layer:    False leaves out every group that moves a last weight, as the authors' code does.
    exact:         round factors to powers of two: outputs stay the same to the last bit.
    backend:       "native": one call of C++ compiled for this processor (needs a compiler).
                   "eager": generated torch operations, for every device. "cudagraph": the same,
                   captured once and replayed. "auto": native on the CPU, cudagraph on CUDA.
                   One that cannot be used gives way to eager, with a warning.
    check:         "sync": a step that cannot be made raises. "async": do not wait for the device;
                   such a step changes nothing, and the next one raises if the cause is still there.
    buffers:       powers of buffers that the table of `enorm_fx.optim` does not know,
                   {"name": -1}.

    Raises ArgumentError for a value that is not allowed.
    """

    def __init__(
        self,
        plan_or_model: Plan | nn.Module,
        optimizer: Optimizer | None = None,
        *,
        c: float = 1.0,
        p: float = 2,
        cycles: int = 1,
        every: int = 1,
        order: str = "sequential",
        last_layer: bool = False,
        exact: bool = False,
        backend: str = "auto",
        check: str = "sync",
        buffers: Mapping[str, int] | None = None,
    ) -> None:
        settings = {
            "c": c,
            "p": p,
            "cycles": cycles,
            "every": every,
            "order": order,
            "last_layer": last_layer,
            "exact": exact,
        }
        check_settings(settings)
        if backend not in BACKENDS:
            raise ArgumentError(f"backend must be one of {BACKENDS}, not {backend!r}")
        if check not in CHECKS:
            raise ArgumentError(f"check must be one of {CHECKS}, not {check!r}")
        self.plan = _as_plan(plan_or_model)
        check_optimizer(self.plan, optimizer)
        self.optimizer = optimizer
        self._settings: dict[str, Any] = settings
        self._wanted, self._deferred = backend, check == "async"
        self._buffers = dict(buffers or {})
        self._calls = 0
        self._handle: RemovableHandle | None = None
        self._step = self._make_step()

    def _make_step(self) -> CompiledStep:
        settings = self._settings
        program = Program(
            self.plan,
            _active(self.plan, settings["last_layer"]),
            p=float(settings["p"]),
            c=settings["c"],
            order=settings["order"],
            exact=check_exact(self.plan, settings["exact"]),
        )
        return CompiledStep(
            program,
            self.optimizer,
            self._buffers,
            cycles=settings["cycles"],
            backend=self._wanted,
            deferred=self._deferred,
        )

    @property
    def backend(self) -> str:
        """The backend that runs the step: what "auto" came to."""
        return self._step.backend

    @property
    def code(self) -> str:
        """The step as the program that runs, or (native) as torch operations that do the same."""
        return self._step.code

    def step(self) -> None:
        """Measure, solve, apply; nothing on calls that `every` passes over.

        Raises NonFiniteError, OptimizerStateError or PlanError; then nothing has changed, the
        count of calls included.
        """
        if (self._calls + 1) % self._settings["every"] == 0:
            self._step.run_()
        self._calls += 1

    def attach(self) -> ENorm:
        """From now on every `optimizer.step()` is followed by `step()`. Returns self."""
        if self.optimizer is None:
            raise ArgumentError("attach() needs the optimizer: pass ENorm(model, optimizer)")
        if self._handle is None:

            def after_step(*_: object) -> None:
                self.step()

            self._handle = self.optimizer.register_step_post_hook(after_step)
        return self

    def detach(self) -> None:
        """Undo `attach`; nothing if it is not attached."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def state_dict(self) -> dict[str, Any]:
        """The count of calls and the settings; plain numbers and strings."""
        return {"calls": self._calls, **self._settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over count and settings of a `state_dict`. Raises ArgumentError if it is none."""
        expected = {"calls", *self._settings}
        if set(state) != expected:
            raise ArgumentError(f"state must have the keys {sorted(expected)}, not {sorted(state)}")
        settings = {key: state[key] for key in self._settings}
        check_settings(settings)
        check_count("calls", state["calls"], least=0)
        check_exact(self.plan, settings["exact"])
        self._settings, self._calls = settings, state["calls"]
        self._step = self._make_step()


def balance(
    model_or_plan: nn.Module | Plan,
    example_inputs: Any = None,
    *,
    p: float = 2,
    c: float = 1.0,
    tol: float = 1e-10,
    exact: bool = False,
    batchnorm: str = "affine",
) -> Report:
    """Bring the weights to the minimum of J, every group, the last too. In place.

    p, c, exact: as for `ENorm`. With exact=True the optimum is rounded to powers of two; where
                 that would not lower J the weights stay.
    tol:         stop when the gap (see `Report`) is at most this. After 1000 cycles it stops
                 anyway, and the report's gap says where.
    example_inputs, batchnorm: for `analyze`, if a model is given.

    Groups along which J has no minimum keep their scale: those with nothing in J on one side, and
    those that could only shrink other weights for ever (p < inf), as where the last weight of
    a residual network is zero.

    Gradients in `.grad` are rescaled too. An optimizer that already holds state for this model
    would be left behind: balance before training, or use `ENorm`.

    Raises ArgumentError, NonFiniteError or PlanError, with nothing written.
    """
    check_settings({"p": p, "c": c, "exact": exact})
    if not (isinstance(tol, float | int) and 0 < tol < 1):
        raise ArgumentError(f"tol must be between 0 and 1, not {tol!r}")
    plan = _as_plan(model_or_plan, example_inputs, batchnorm)
    p = float(p)
    program = Program(plan, plan.groups, p=p, c=c, exact=check_exact(plan, exact), wide=True)
    check_finite(plan)
    before = objective(plan, p, c)
    program.bind_()
    with full_precision(program.device):
        writes = program.collect(None, None, gradients=True)
        descent, sizes = program.measure_()
        cycles, gap = _converge_(descent, tol)
        if exact:
            _round_(descent)
        program.apply_(descent.u, sizes, writes)
    largest = float(descent.u.abs().amax())
    return Report(before, objective(plan, p, c), cycles, largest, gap)


def _converge_(descent: Descent, tol: float) -> tuple[int, float]:
    """Cycles until the gap is at most tol: the number of cycles, and the gap."""
    coarse = None if math.isinf(descent.p) else _make_coarse_(descent)
    cycles, gap = 0, float(imbalance(descent))
    while gap > tol and cycles < _MAX_CYCLES:
        sweep_(descent, exact=False)
        if coarse is not None:
            correct_(descent, coarse)
        cycles, gap = cycles + 1, float(imbalance(descent))
    return cycles, gap


def _make_coarse_(descent: Descent) -> Coarse:
    """The coarse problem of the groups that have a minimum; the others leave the descent."""
    while True:
        coarse = make_coarse(descent, alive(descent))
        runaway = unbounded(descent, coarse)
        if not runaway:
            return coarse
        layout = descent.layout
        kept = [g for number, g in enumerate(layout.groups) if number not in runaway]
        turns = tuple((number,) for number in range(len(kept)))
        descent.layout = replace(layout, groups=tuple(kept), batches=turns)


def _round_(descent: Descent) -> None:
    """Log scales to multiples of log 2, or to 0 where that would be better."""
    rounded = (descent.u / _LOG_2).round() * _LOG_2
    descent.u = torch.zeros_like(rounded)
    before = log_cost(descent)
    descent.u = rounded
    if not log_cost(descent) < before:
        descent.u = torch.zeros_like(rounded)


def _active(plan: Plan, last_layer: bool) -> tuple[Group, ...]:
    """The groups that a step may move."""
    if last_layer:
        return plan.groups
    moved = torch.zeros(plan.num_scales + 1, dtype=torch.bool)
    for scaled in plan.parameters:
        if scaled.last:
            for term in scaled.terms:
                moved[term.index.cpu().reshape(-1)] = True
    moved[-1] = False
    return tuple(g for g in plan.groups if not moved[g.start : g.start + g.channels].any())


def _as_plan(
    plan_or_model: Plan | nn.Module, example_inputs: Any = None, batchnorm: str | None = None
) -> Plan:
    if isinstance(plan_or_model, Plan):
        if example_inputs is not None:
            raise ArgumentError("example_inputs go with a model; a plan was given")
        return plan_or_model
    if not isinstance(plan_or_model, nn.Module):
        raise ArgumentError(f"expected a Plan or an nn.Module, not {type(plan_or_model).__name__}")
    from enorm_fx.analysis import analyze  # not needed, and not loaded, where there is a plan

    if batchnorm is None:
        return analyze(plan_or_model, example_inputs)
    return analyze(plan_or_model, example_inputs, batchnorm=batchnorm)
