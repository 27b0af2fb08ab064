"""ENorm: keep a network's function and balance its weights after each step of training.

Stock, Graham, Gribonval, Jegou: Equi-normalization of Neural Networks, ICLR 2019, arXiv:1902.10416.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from enorm_fx.analysis import as_plan
from enorm_fx.errors import ArgumentError, EnormError
from enorm_fx.model_plan import Plan
from enorm_fx.step.backends import BACKENDS, CHECKS
from enorm_fx.step.checks import check_count, check_settings, checked_optimizers
from enorm_fx.step.fused.step import FusedStep
from enorm_fx.step.fused.takeover import TakenOver
from enorm_fx.step.making import Maker
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
                   A list where several train one model: all that are not in it keep buffers which
                   do not follow. Call `step` when all have stepped; `attach` follows the last one.
    c:             > 0; at the optimum of a chain a consumer's norm is c times its producer's.
    p:             >= 1, or inf: the norm that falls.
    cycles:        cycles per step, on norms that are measured once.
    every:         act on each every-th call of `step`.
    order:         "sequential": groups one after the other, each sees those before it.
                   "colored": groups that share no weight in one go; fewer and larger operations.
                   "simultaneous": all factors from the norms at the start of the cycle.
                   "alternating": a call moves the groups of one colour only, colours take turns by
                   the count of calls; `cycles` is then the turns that one call makes.
    last_layer:    False leaves out every group that moves a last weight, as the authors' code does:
                   these then stay as badly scaled as they are, in a residual network the stream.
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
                   "triton", with fused=True: one pass by a kernel for a GPU.
                   One that cannot be used gives way to eager, with a warning. Weights that lie in
                   parts on several processes (DTensors) are stepped the careful way whatever is
                   asked for, with one reduction of vectors for each turn of the order: "colored"
                   has few turns.
    check:         "sync": a step that cannot be made raises. "async": do not wait for the device;
                   such a step changes nothing, and the next one raises if the cause is still there.
    buffers:       powers of buffers that the table of `enorm_fx.optim` does not know,
                   {"name": -1}.
    fused:         take over `optimizer.step` (SGD, Adam, AdamW), until `detach` or the end of a
                   `with`, and rescale in it: what would be multiplied after a step is multiplied
                   where the next one touches it anyway, gradients by the inverse; call `step` no
                   more. The trajectory is that of `optimizer.step(); enorm.step()`; between steps
                   weights, buffers and gradients are those before the last rescaling, of one and
                   the same network. Needs a plan that is exact. Gradients are read once more, to
                   refuse a step with one that is not finite before anything is written; what is
                   written to weights or buffers behind autograd's back (`.data`) is found later.
                   Native for float32 and float64 on the CPU; else torch operations, which are not
                   faster than the two steps. On CUDA backend="triton" makes one pass of float32 and
                   float64 there too: tested in triton's interpreter, and not yet measured on a GPU,
                   so "auto" does not take it.

    Raises ArgumentError for a value that is not allowed.
    """

    def __init__(
        self,
        plan_or_model: Plan | nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        c: float = 1.0,
        p: float = 2,
        cycles: int = 1,
        every: int = 1,
        order: str = "sequential",
        last_layer: bool = True,
        exact: bool = False,
        start: str = "balanced",
        converge: bool = False,
        backend: str = "auto",
        check: str = "sync",
        buffers: Mapping[str, int] | None = None,
        fused: bool = False,
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
        check_settings({**settings, "fused": fused})
        if backend not in BACKENDS:
            raise ArgumentError(f"backend must be one of {BACKENDS}, not {backend!r}")
        if check not in CHECKS:
            raise ArgumentError(f"check must be one of {CHECKS}, not {check!r}")
        self.plan = as_plan(plan_or_model)
        self.optimizers = checked_optimizers(self.plan, optimizer)
        self._maker = Maker(
            self.plan, settings, self.optimizers, dict(buffers or {}), backend, check == "async"
        )
        self._maker.check(fused)
        self._maker.notes.left_out(self.plan, self._maker.groups)
        self._calls = self._refused = 0
        self._seconds = 0.0
        self._started = start == "as_is" or not self.plan.exact
        self._start_hooks: list[RemovableHandle] = []
        self._handle: RemovableHandle | None = None
        self._taken = self._taking(self.optimizers[0]) if fused else None
        self._fused: FusedStep | None = None
        self._steps: tuple[StepRunner | ConvergingRunner, ...] = ()
        self._make_()
        if self._taken is None:
            self._await_start()
        else:
            self._taken.take_()

    @property
    def _settings(self) -> Mapping[str, Any]:
        return self._maker.settings

    def _make_(self) -> None:
        """Make what calls run, or what runs inside the optimizer's step."""
        if self._taken is not None:
            self._fused = self._maker.fused(self.optimizers[0])
        else:
            self._steps = self._maker.steps()

    def _taking(self, optimizer: Optimizer) -> TakenOver:
        return TakenOver(optimizer, self._step_optimizer_)

    def _step_optimizer_(self, plain: Callable[[], None]) -> None:
        """What `optimizer.step` is while it is taken over. plain: what it was."""
        if self._fused is None or not will_write(self._fused.optimizer):
            plain()
            return
        every = self._settings["every"]
        acts = (self._calls + 1) % every == 0
        turn = self._turn(self._calls // every) if acts else None
        start = None if self._started else partial(self._start_, gradients=True)
        try:
            self._fused.run_(plain, turn, start)
        except EnormError as error:
            self._refused += 1
            self._maker.notes.refused(error)
            raise
        self._calls += 1

    def _turn(self, acted: int) -> int:
        """The number of what a call runs that comes after so many that have acted."""
        cycles: int = self._settings["cycles"]
        return acted * cycles % (len(self._steps) if self._fused is None else self._fused.turns)

    @property
    def _next(self) -> StepRunner | ConvergingRunner:
        """What the next call that acts runs."""
        return self._steps[self._turn(self._calls // self._settings["every"])]

    def _await_start(self) -> None:
        """Have an optimizer's next step begin with the start; no longer, once it is made."""
        self._forget_start()
        if self._started:
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
        for optimizer in self.optimizers:
            self._start_hooks.append(optimizer.register_step_pre_hook(hook))
            weakref.finalize(self, self._start_hooks[-1].remove)

    def _forget_start(self) -> None:
        while self._start_hooks:
            self._start_hooks.pop().remove()

    def _start_(self, gradients: bool) -> None:
        """Bring the weights to the optimum; gradients in `.grad` too, if they are yet to be used.

        Raises NonFiniteError, OptimizerStateError or PlanError, with nothing written.
        """
        (self._next if self._fused is None else self._fused).check()
        careful = self._maker.to_optimum()
        scales = to_optimum_(
            careful,
            self.optimizers,
            self._maker.buffers,
            tol=_START_TOLERANCE,
            exact=self._settings["exact"],
            gradients=gradients,
            polish=True,
        )
        self._started = True
        self._maker.notes.started(careful.largest_change(scales))

    @property
    def backend(self) -> str:
        """The backend that runs the step: what "auto" came to."""
        return (self._next if self._fused is None else self._fused).backend

    @property
    def code(self) -> str:
        """The step as the program that runs, or (native) as torch operations that do the same."""
        return (self._next if self._fused is None else self._fused).code

    def step(self) -> None:
        """Measure, solve, apply; nothing on calls that `every` passes over.

        A start that is still to be made is made now, and is the step.

        Raises NonFiniteError, OptimizerStateError or PlanError; then nothing has changed, the
        count of calls included.
        """
        if self._fused is not None:
            raise ArgumentError("with fused=True the optimizer's step does it: leave out step()")
        begun = time.perf_counter()
        try:
            if not self._started:
                self._start_(gradients=False)
            elif (self._calls + 1) % self._settings["every"] == 0:
                self._next.run_()
        except EnormError as error:
            self._refused += 1
            self._maker.notes.refused(error)
            raise
        finally:
            self._seconds += time.perf_counter() - begun
        self._calls += 1
        if self._start_hooks:
            self._await_start()

    def stats(self) -> Stats:
        """How balanced the weights are now (measured when asked), and what steps have cost so far.

        If fused: before the rescaling that is pending, and 0 seconds, since the time is that of the
        optimizer's step.

        Raises PlanError if the model is no longer the one that was analyzed.
        """
        return Stats(
            self.plan.norm(self._settings["p"], self._settings["c"]),
            self._calls,
            self._refused,
            self._seconds,
            imbalance_now(self._maker.to_optimum(), self._maker.groups),
        )

    def attach(self) -> ENorm:
        """From now on every `optimizer.step()` is followed by `step()`. Returns self.

        Of several, the last one's. A step that a GradScaler skips is followed by none.
        If fused, it takes `step` in, as it has done from the beginning if it was not detached.
        """
        if not self.optimizers:
            raise ArgumentError("attach() needs the optimizer: pass ENorm(model, optimizer)")
        if self._taken is not None:
            self._taken.take_()
        elif self._handle is None:

            def after_step(optimizer: Optimizer, *_: object) -> None:
                if will_write(optimizer):
                    self.step()

            hook = torch.compiler.disable(after_step)
            self._handle = self.optimizers[-1].register_step_post_hook(hook)
            self._await_start()
        return self

    def detach(self) -> None:
        """Undo `attach`; nothing if it is not attached. A start not made yet waits for `step`.

        If fused, what is pending is applied first (see `flush_`), and `optimizer.step` is given
        back in any case.
        """
        if self._taken is not None and self._taken.active:
            try:
                self.flush_()
            finally:
                self._taken.give_back_()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            self._forget_start()

    def __enter__(self) -> ENorm:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def flush_(self) -> None:
        """If fused: do the rescaling now that the next `optimizer.step()` would begin with, on
        weights, buffers and gradients; else there is none.

        Nothing needs it but a comparison with a run that is not fused: what is stored is at all
        times one network. Raises as `step` does, with nothing written.
        """
        if self._fused is not None:
            self._fused.flush_()

    def state_dict(self) -> dict[str, Any]:
        """Count of calls, whether the start is made, and settings; plain numbers and strings.

        If fused, `pending` too: whether the weights are still to be rescaled. By which factors,
        they tell.
        """
        state = {"calls": self._calls, "started": self._started, **self._settings}
        return state if self._fused is None else {**state, "pending": self._fused.due is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over count, start and settings of a `state_dict`.

        Load it before the optimizer's next step; weights and the optimizer's state may be loaded
        before it or after. States of fused runs and of others may be exchanged: one that is not
        fused leaves out a rescaling that is pending. Raises ArgumentError if it is no such state.
        """
        expected = {"calls", "started", *self._settings}
        if set(state) - {"pending"} != expected:
            raise ArgumentError(f"state must have the keys {sorted(expected)}, not {sorted(state)}")
        settings = {key: state[key] for key in self._settings}
        pending = state.get("pending", False)
        check_settings({**settings, "started": state["started"], "pending": pending})
        check_count("calls", state["calls"], least=0)
        maker = replace(self._maker, settings=settings)
        maker.check(self._fused is not None)
        self._maker, self._calls = maker, state["calls"]
        self._started = state["started"] or not self.plan.exact
        acted = self._calls // settings["every"]
        self._make_()
        if self._fused is None:
            self._await_start()
        elif pending and acted:
            self._fused.due = self._turn(acted - 1)
