"""Run a model again and compare its calls with those of a recording, one by one.

Nothing is computed: each call that is the recorded one gives the recorded result, so that a second
run costs a fraction of the first.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from enorm_fx.nested import replaced, tensors_anywhere
from enorm_fx.tracing.differences import END, Difference, same_call, same_values, shown
from enorm_fx.tracing.op_keys import op_key
from enorm_fx.tracing.op_traits import METADATA
from enorm_fx.tracing.recorder import Call, Raised, Recorder, is_count
from enorm_fx.tracing.run import Run
from enorm_fx.tracing.trace import user_frame


class DifferentCall(BaseException):
    """Ends a replay. No error of the model's, so that the model does not catch it."""

    def __init__(self, difference: Difference) -> None:
        super().__init__()
        self.difference = difference


class EndOfRecording(BaseException):
    """The replay has come to the call at which the recording was cut."""


class Replay(Run):
    """Gives the results of a recording for as long as the calls are the same.

    kept:  identities of tensors that the recorded run left in the model.
    cut:   the recording ended at its last call, which has no result.
    asked: takes the modes that code other than torch's asks for; None: nobody wants to know.
    """

    def __init__(
        self, recorder: Recorder, kept: Collection[int], cut: bool, asked: set[str] | None
    ) -> None:
        super().__init__(recorder.model, recorder.opaque, recorder.fakes, asked)
        self._calls = recorder.calls
        recorder.forget_attributes()
        self._kept = kept
        self._cut = cut
        self._position = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.questions.pause()
        try:
            return super().__torch_function__(func, types, args, kwargs)
        finally:
            self.questions.resume()

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_count(function, args):
            return args[0]
        recorded = self._next()
        if recorded is not None and self._is(recorded, function, args, kwargs):
            return self._step(recorded)
        if op_key(function)[0] not in METADATA and _has_tensor((args, kwargs)):
            raise self._other(function)
        out = function(*args, **kwargs)
        if _has_tensor(out):
            raise self._other(function)
        return out

    def unseen(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        recorded = self._next()
        if recorded is None or not self._is(recorded, target, args, kwargs):
            raise self._other(target)
        return self._step(recorded)

    def finish(self) -> None:
        """The run is over. Raises DifferentCall where the recorded one goes on."""
        recorded = self._next()
        if recorded is not None:
            raise DifferentCall(Difference(_shown(recorded), END))

    def _next(self) -> Call | None:
        return self._calls[self._position] if self._position < len(self._calls) else None

    def _step(self, recorded: Call) -> Any:
        self._position += 1
        if self._cut and self._position == len(self._calls):
            raise EndOfRecording
        if isinstance(recorded.out, Raised):
            raise recorded.out.error()
        is_list = isinstance(recorded.out, list)  # which the model may change
        return replaced(Tensor, recorded.out, lambda t: t) if is_list else recorded.out

    def _other(self, function: Any) -> DifferentCall:
        recorded = self._next()
        first = END if recorded is None else _shown(recorded)
        return DifferentCall(Difference(first, shown(op_key(function)[0], user_frame())))

    def _is(self, recorded: Call, function: Any, args: Any, kwargs: Any) -> bool:
        if not _same_function(recorded.function, function):
            return False
        given = (recorded.args, recorded.kwargs)
        return same_call(op_key(function)[0], given, (args, kwargs), self._same_tensor)

    def _same_tensor(self, one: Tensor, two: Tensor) -> bool:
        """The same constant, or what the recorded run left in the place of one."""
        if self.fakes.real(one) is None or self.fakes.name(one) is not None:
            return False
        if id(two) in self._kept:  # pinned, like the constant that it takes the place of
            return one.dtype == two.dtype
        first, second = self.fakes.value(one), self.fakes.value(two)
        if first is None or second is None or first.is_meta:
            return False
        with torch._C.DisableTorchFunction(), unset_fake_temporarily():
            return same_values(first, second)


def _same_function(one: Any, two: Any) -> bool:
    """The same function, or the same code: a class may be made anew in every call."""
    if one is two or one == two:
        return True
    if not (isinstance(one, type) and isinstance(two, type)):
        return False
    codes = [getattr(kind.__dict__.get("forward"), "__func__", None) for kind in (one, two)]
    first, second = (getattr(function, "__code__", None) for function in codes)
    return first is not None and first is second


def _has_tensor(value: Any) -> bool:
    return next(tensors_anywhere(value), None) is not None


def _shown(call: Call) -> str:
    return shown(op_key(call.function)[0], call.source)
