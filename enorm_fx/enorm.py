"""ENorm: keep a network's function and balance its weights after each step of training.

Stock, Graham, Gribonval, Jegou: Equi-normalization of Neural Networks, ICLR 2019, arXiv:1902.10416.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from enorm_fx.analysis import as_plan
from enorm_fx.errors import ArgumentError
from enorm_fx.model_plan import Plan
from enorm_fx.plan.records import Group
from enorm_fx.step.backends import BACKENDS, CHECKS
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.checks import (
    check_count,
    check_exact,
    check_optimizer,
    check_settings,
)
from enorm_fx.step.runner import StepRunner


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
    exact:         round factors to powers of two: outputs stay the same to the last bit, while
                   weights and activations stay normal numbers of their dtype.
    backend:       "native": one call of C++ compiled for this processor (needs a compiler).
                   "eager": generated torch operations, for every device. "cudagraph": the same,
                   captured once and replayed. "auto": native on the CPU, cudagraph on CUDA.
                   One that cannot be used gives way to eager, with a warning. Weights that lie in
                   parts on several processes (DTensors) are stepped the careful way whatever is
                   asked for, with one reduction of vectors for each turn of the order: "colored"
                   has few turns.
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
        self.plan = as_plan(plan_or_model)
        check_optimizer(self.plan, optimizer)
        self.optimizer = optimizer
        self._settings: dict[str, Any] = settings
        self._wanted, self._deferred = backend, check == "async"
        self._buffers = dict(buffers or {})
        self._calls = 0
        self._handle: RemovableHandle | None = None
        self._step = self._make_step()

    def _make_step(self) -> StepRunner:
        settings = self._settings
        careful = CarefulStep(
            self.plan,
            _active(self.plan, settings["last_layer"]),
            p=float(settings["p"]),
            c=settings["c"],
            order=settings["order"],
            exact=check_exact(self.plan, settings["exact"]),
        )
        return StepRunner(
            careful,
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
