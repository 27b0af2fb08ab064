"""ENorm: keep a network's function and balance its weights after each step of training.

Stock, Graham, Gribonval, Jegou: Equi-normalization of Neural Networks, ICLR 2019, arXiv:1902.10416.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from enorm_fx.analysis import as_plan
from enorm_fx.errors import ArgumentError, EnormError
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
from enorm_fx.step.layout import Turns, alternating_turns
from enorm_fx.step.optimizer_call import followed_by, will_write
from enorm_fx.step.optimum import to_optimum_
from enorm_fx.step.runner import ConvergingRunner, StepRunner
from enorm_fx.step.stats import Stats, imbalance_now

_START_TOLERANCE = 1e-10  # the gap, as of `balance`


class ENorm:
    """Balanced weights throughout training: one cycle after each optimizer step, as in the paper.

    Call `step` after `optimizer.step()`, or `attach` once. The network's function stays; weights,
    biases and the optimizer's buffers are multiplied in place, all or nothing. Gradients
    that lie in `.grad` are left alone: they are spent once the optimizer has stepped. Do not call
    `step` between `backward` and `optimizer.step()`, and clear gradients before the next
    `backward` (`rescale_` and `balance`, which may be called at any time, do scale them).

    The first cycle would come too late where units are badly scaled: the optimizer's first step has
    then ruined them. So training starts at the optimum (`start="balanced"`): as the first thing in
    the optimizer's next step (after the first call of its closure, if it is given one), weights,
    gradients and buffers that it already holds are rescaled, all or nothing. It is not done when
    ENorm is made, so that weights and states may be loaded before or after; a state with which
    training has begun is not balanced again, and a resumed run goes on bit for bit. Without an
    optimizer the first `step` does it, in place of a cycle.

    plan_or_model: what `analyze` gave, or a model, which is analyzed with defaults.
    optimizer:     its buffers follow the weights; None where there is none, or it keeps none.
                   Buffers of another optimizer of the same weights do not follow.
    c:             > 0; at the optimum of a chain a consumer's norm is c times its producer's.
    p:             >= 1, or inf: the norm that falls.
    cycles:        cycles per step, on norms that are measured once.
    every:         act on each every-th call of `step`.
    order:         "sequential": groups one after the other, each sees those before it.
                   "colored": groups that share no weight in one go; fewer and larger operations.
                   "simultaneous": all factors from the norms at the start of the cycle.
                   "alternating": a call moves the groups of one colour only, colours take turns by
                   the count of calls; `cycles` is then the turns that one call makes.
    last_layer:    False leaves out every group that moves a last weight, as the authors' code does.
    exact:         round factors to powers of two: outputs stay the same to the last bit, while
                   weights and activations stay normal numbers of their dtype.
    start:         "balanced": at the optimum that steps go to, by the same groups, p, c and exact.
                   "as_is": with the weights as they are. A plan that is not exact starts as it
                   is: balancing would change what the network computes before it is trained (a
                   pretrained one would lose what it knows). The one to call for that is `balance`.
    converge:      go to the optimum of the moment in each step, with the coarse correction of
                   `balance`, as many cycles as that takes (to a gap of 1e-8), whatever `cycles`
                   and `order` say. It runs as torch operations that wait for the device.
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
        start: str = "balanced",
        converge: bool = False,
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
            "start": start,
            "converge": converge,
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
        self._check_backend(converge)
        self._buffers = dict(buffers or {})
        self._calls = self._refused = 0
        self._seconds = 0.0
        self._started = start == "as_is" or not self.plan.exact
        self._start_hook: RemovableHandle | None = None
        self._handle: RemovableHandle | None = None
        self._steps = self._make_steps()
        self._await_start()

    def _check_backend(self, converge: bool) -> None:
        if converge and self._wanted not in ("auto", "eager"):
            raise ArgumentError(
                f"converge=True runs as torch operations, not by backend={self._wanted!r}: leave "
                "backend at 'auto'"
            )

    def _make_steps(self) -> tuple[StepRunner | ConvergingRunner, ...]:
        """What calls run, one after the other and then again from the first."""
        settings = self._settings
        if settings["converge"]:
            return (
                ConvergingRunner(
                    self._make_careful("sequential", wide=True),
                    self.optimizer,
                    self._buffers,
                    exact=settings["exact"],
                ),
            )
        if settings["order"] != "alternating":
            return (self._make_runner(settings["order"], settings["cycles"]),)
        turns = alternating_turns(self.plan, _active(self.plan, settings["last_layer"]))
        # A call with several turns begins where the one before it has ended.
        return tuple(
            self._make_runner(
                tuple(turns[(start + k) % len(turns)] for k in range(settings["cycles"])), 1
            )
            for start in range(len(turns))
        ) or (self._make_runner((), 1),)

    def _make_runner(self, order: str | Turns, cycles: int) -> StepRunner:
        return StepRunner(
            self._make_careful(order, wide=False),
            self.optimizer,
            self._buffers,
            cycles=cycles,
            backend=self._wanted,
            deferred=self._deferred,
        )

    @property
    def _step(self) -> StepRunner | ConvergingRunner:
        """What the next call that acts runs."""
        every, cycles = self._settings["every"], self._settings["cycles"]
        turn: int = self._calls // every * cycles % len(self._steps)
        return self._steps[turn]

    def _make_careful(self, order: str | Turns, wide: bool) -> CarefulStep:
        settings, active = self._settings, _active(self.plan, self._settings["last_layer"])
        if not isinstance(order, str):
            moved = {group.start for turn in order for group in turn}
            active = tuple(group for group in active if group.start in moved)
        return CarefulStep(
            self.plan,
            active,
            p=float(settings["p"]),
            c=settings["c"],
            order=order,
            exact=check_exact(self.plan, settings["exact"]),
            wide=wide,
        )

    def _await_start(self) -> None:
        """Have the optimizer's next step begin with the start; no longer, once it is made."""
        if self._start_hook is not None:
            self._start_hook.remove()
            self._start_hook = None
        if self._started or self.optimizer is None:
            return
        # Weak: an ENorm that nobody holds any more has no say in what the optimizer does.
        this = weakref.ref(self)

        def start_() -> None:
            enorm = this()
            if enorm is not None and not enorm._started:
                enorm._start_(gradients=True)

        def before_step(
            optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if not will_write(optimizer):
                return None
            if (found := followed_by(start_, args, kwargs)) is not None:
                return found  # gradients are computed inside the step
            start_()
            return None

        # A compiled step calls the hooks as they are: they look at memory, and write behind it.
        hook = torch.compiler.disable(before_step)
        self._start_hook = self.optimizer.register_step_pre_hook(hook)
        weakref.finalize(self, self._start_hook.remove)

    def _start_(self, gradients: bool) -> None:
        """Bring the weights to the optimum; gradients in `.grad` too, if they are yet to be used.

        Raises NonFiniteError, OptimizerStateError or PlanError, with nothing written.
        """
        self._step.check()
        to_optimum_(
            self._make_careful("sequential", wide=True),
            self.optimizer,
            self._buffers,
            tol=_START_TOLERANCE,
            exact=self._settings["exact"],
            gradients=gradients,
            polish=True,
        )
        self._started = True

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

        A start that is still to be made is made now, and is the step.

        Raises NonFiniteError, OptimizerStateError or PlanError; then nothing has changed, the
        count of calls included.
        """
        begun = time.perf_counter()
        try:
            if not self._started:
                self._start_(gradients=False)
            elif (self._calls + 1) % self._settings["every"] == 0:
                self._step.run_()
        except EnormError:
            self._refused += 1
            raise
        finally:
            self._seconds += time.perf_counter() - begun
        self._calls += 1
        if self._start_hook is not None:
            self._await_start()

    def stats(self) -> Stats:
        """How balanced the weights are now (measured when asked), and what steps have cost so far.

        Raises PlanError if the model is no longer the one that was analyzed.
        """
        groups = _active(self.plan, self._settings["last_layer"])
        return Stats(
            self.plan.norm(self._settings["p"], self._settings["c"]),
            self._calls,
            self._refused,
            self._seconds,
            imbalance_now(self._make_careful("sequential", wide=True), groups),
        )

    def attach(self) -> ENorm:
        """From now on every `optimizer.step()` is followed by `step()`. Returns self.

        A step that a GradScaler skips is followed by none.
        """
        if self.optimizer is None:
            raise ArgumentError("attach() needs the optimizer: pass ENorm(model, optimizer)")
        if self._handle is None:

            def after_step(optimizer: Optimizer, *_: object) -> None:
                if will_write(optimizer):
                    self.step()

            hook = torch.compiler.disable(after_step)
            self._handle = self.optimizer.register_step_post_hook(hook)
            self._await_start()
        return self

    def detach(self) -> None:
        """Undo `attach`; nothing if it is not attached. A start not made yet waits for `step`."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            if self._start_hook is not None:
                self._start_hook.remove()
                self._start_hook = None

    def state_dict(self) -> dict[str, Any]:
        """Count of calls, whether the start is made, and settings; plain numbers and strings."""
        return {"calls": self._calls, "started": self._started, **self._settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over count, start and settings of a `state_dict`.

        Load it before the optimizer's next step; weights and the optimizer's state may be loaded
        before it or after. Raises ArgumentError if it is no such state.
        """
        expected = {"calls", "started", *self._settings}
        if set(state) != expected:
            raise ArgumentError(f"state must have the keys {sorted(expected)}, not {sorted(state)}")
        settings = {key: state[key] for key in self._settings}
        check_settings({**settings, "started": state["started"]})
        check_count("calls", state["calls"], least=0)
        check_exact(self.plan, settings["exact"])
        self._check_backend(settings["converge"])
        self._settings, self._calls = settings, state["calls"]
        self._started = state["started"] or not self.plan.exact
        self._steps = self._make_steps()
        self._await_start()


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
