"""Another function in the place of `step`, on one optimizer, until it is given back."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from enorm_fx.errors import ArgumentError

Run = Callable[[Callable[[], None]], None]


class TakenOver:
    """`optimizer.step` runs `run(plain)` instead, where plain() is the step of the class.

    A closure is evaluated first, and hooks of the optimizer run around it, as ever. Schedulers may
    have wrapped `step` before, and may wrap it afterwards; anybody else who has is refused.
    """

    def __init__(self, optimizer: Optimizer, run: Run) -> None:
        self._optimizer, self._run, self._active = optimizer, run, False
        self._before: Any = None
        hooked = type(optimizer).step
        # The class's own function, without the loop over hooks around it: that is made anew.
        plain = hooked.__wrapped__ if getattr(hooked, "hooked", False) else hooked  # type: ignore[attr-defined]

        @functools.wraps(plain)
        def step(this: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            if not self._active:
                return plain(this, closure)
            if self._before is not None:
                this._opt_called = True  # type: ignore[attr-defined]  # the scheduler asks for it
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            with torch.no_grad():
                self._run(functools.partial(plain, this))
            return loss

        # A compiled step calls it as it is: it looks at memory, and writes behind it.
        self._step = Optimizer.profile_hook_step(torch.compiler.disable(step))

    @property
    def active(self) -> bool:
        return self._active

    def take_(self) -> None:
        """Raises ArgumentError if somebody else has replaced `step`."""
        if self._active or self._is_below(
            getattr(self._optimizer.step, "__func__", self._optimizer.step)
        ):
            self._active = True
            return
        before = vars(self._optimizer).get("step")
        by_scheduler = hasattr(before, "_wrapped_by_lr_sched")
        if before is not None and not (
            by_scheduler and getattr(before, "__wrapped__", None) is type(self._optimizer).step
        ):
            raise ArgumentError(
                f"the step of this {type(self._optimizer).__name__} has been replaced, by another "
                "ENorm or somebody else: fused=True must come first. Detach it, or use fused=False"
            )
        if by_scheduler:
            self._step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        self._before = before
        # A method, as schedulers expect it.
        self._optimizer.step = types.MethodType(self._step, self._optimizer)  # type: ignore[method-assign]
        self._active = True

    def give_back_(self) -> None:
        """From now on `step` is what it was, under a scheduler that has wrapped it since, too."""
        self._active = False
        now = vars(self._optimizer).get("step")
        if getattr(now, "__func__", None) is not self._step:
            return
        if self._before is None:
            del self._optimizer.step
        else:
            self._optimizer.step = self._before  # type: ignore[method-assign]
        self._before = None

    def _is_below(self, function: Any) -> bool:
        while function is not None:
            if function is self._step:
                return True
            function = getattr(function, "__wrapped__", None)
        return False
