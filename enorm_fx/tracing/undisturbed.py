"""Run a model without leaving a trace in it: modules, inputs, random numbers, logs."""

from __future__ import annotations

import logging
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from enorm_fx.errors import TraceError
from enorm_fx.nested import tensors_anywhere

# What a model's own code may raise on inputs that it does not accept.
FOREIGN = (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError,
           ArithmeticError)  # fmt: skip

# Torch logs whole tracebacks and graphs for what is an ordinary "no" here: our error says it.
_LOUD = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.export",
         "torch._export", "torch._functorch")  # fmt: skip

# Hooks that set a weight of their module to what they compute of its parameters.
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm)

_NUMBERS = (bool, int, float, complex, str, bytes)
_CONTAINERS = (dict, list, set, OrderedDict)


class _Contents:
    """What containers, and containers and plain objects in them, hold now."""

    def __init__(self, depth: int) -> None:
        self.saved: list[tuple[Any, Any]] = []
        self._depth = depth
        self._seen: set[int] = set()

    def save(self, value: Any, depth: int = 0) -> None:
        """Note what a value holds."""
        kind = type(value)
        if kind in _CONTAINERS:
            if depth < self._depth and id(value) not in self._seen:
                self._seen.add(id(value))
                self.saved.append((value, value.copy()))
                for item in value.values() if isinstance(value, dict) else value:
                    self.save(item, depth + 1)
        elif kind is tuple:
            for item in value:
                self.save(item, depth)
        elif depth < self._depth and _is_plain_object(value):
            self.save(value.__dict__, depth + 1)

    def restore(self) -> None:
        """Put it back where it changed."""
        for container, copy in self.saved:
            if _differs(container, copy):
                container.clear()
                container.extend(copy) if isinstance(container, list) else container.update(copy)


class Snapshot:
    """What the modules of a model, and its inputs, hold: to see what a run changed and undo it."""

    def __init__(self, model: nn.Module, inputs: Any = None) -> None:
        self._saved: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._contents = _Contents(_NESTED)
        self._inputs = _Contents(_NESTED_IN_INPUTS)
        for path, module in model.named_modules():
            self._saved.append((path, module.__dict__, dict(module.__dict__)))
            for value in module.__dict__.values():
                self._contents.save(value)
        self._inputs.save([inputs])

    def new_tensors(self) -> Iterator[tuple[Tensor, str]]:
        """Fake tensors that the model keeps after a run, with the attribute that holds them.

        A weight that one of torch's hooks computes before every call is no such: a call that read
        the one of the call before would be noticed when the model runs again.
        """
        for path, current, saved in self._saved:
            hooks = current.get("_forward_pre_hooks", {}).values()
            made_anew = {hook.name for hook in hooks if isinstance(hook, _WEIGHT_HOOKS)}
            for name, value in current.items():
                if name in ("_modules", *made_anew) or (
                    value is saved.get(name) and not _may_hold(value)
                ):
                    continue
                for tensor in tensors_anywhere(value):
                    if isinstance(tensor, FakeTensor):
                        yield tensor, f"'{path}.{name}'".replace("'.", "'")

    def numbers(self) -> list[tuple[str, Any]]:
        """Numbers and texts in the modules that are not as they were, with their names.

        Of a list, dict or set that was changed, how many items it has and what plain ones.
        """
        found: list[tuple[str, Any]] = []
        for path, current, saved in self._saved:
            for name, value in current.items():
                before = saved.get(name, _MISSING)
                if value is not before and isinstance(value, _NUMBERS) and value != before:
                    found.append((f"{path}.{name}".lstrip("."), value))
        for container, copy in self._contents.saved:
            if _differs(container, copy):
                items = container.values() if isinstance(container, dict) else container
                plain = [item for item in items if isinstance(item, _NUMBERS)]
                found.append((f"a {type(container).__name__}", (len(container), plain)))
        return found

    def restore(self) -> None:
        """Put everything back, the contents of lists, dicts and sets too.

        What did not change is not touched: another thread may be reading it.
        """
        for _, current, saved in self._saved:
            if _differs(current, saved):
                current.clear()
                current.update(saved)
        self._contents.restore()
        self._inputs.restore()

    def restore_inputs(self) -> None:
        """Put the inputs back: each call of a model gets the same."""
        self._inputs.restore()


_NESTED = 4  # how deep containers in attributes of modules are looked into
_NESTED_IN_INPUTS = 8  # a cache among the inputs has several levels of its own
_MISSING = object()


def _differs(now: Any, before: Any) -> bool:
    """Whether a container holds other things, or in another order."""
    if len(now) != len(before):
        return True
    if isinstance(now, set):
        return bool(now != before)
    if isinstance(now, dict):
        pairs = zip(now.items(), before.items(), strict=True)
        return any(a is not b or x is not y for (a, x), (b, y) in pairs)
    return any(a is not b for a, b in zip(now, before, strict=True))


def _is_plain_object(value: Any) -> bool:
    """An object of a user's own class, which may hold tensors."""
    if isinstance(value, (type, nn.Module)) or type(getattr(value, "__dict__", None)) is not dict:
        return False
    return type(value).__module__.partition(".")[0] not in ("builtins", "torch", "functools")


def _may_hold(value: Any) -> bool:
    """Whether there may be tensors in a value."""
    if type(value) in _NUMBERS or value is None:
        return False
    if isinstance(value, (dict, list, tuple, set)):
        return bool(value)
    return _is_plain_object(value)


def random_state() -> tuple[Any, ...]:
    """What changes when random numbers are drawn in Python or numpy."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    _, words, *rest = numpy.random.get_state()
    return (random.getstate(), words.tobytes(), *rest)


@contextmanager
def undisturbed(model: nn.Module, inputs: Any = None) -> Iterator[Snapshot]:
    """What runs in this block leave in the modules, or in objects among the inputs, is undone."""
    snapshot = Snapshot(model, inputs)
    try:
        yield snapshot
    finally:
        snapshot.restore()


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """One run: what it does to random numbers is undone, what torch logs is kept quiet.

    Raises TraceError where it draws random numbers in Python.
    """
    python_state, numbers = random.getstate(), random_state()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    loggers = [logging.getLogger(name) for name in _LOUD]
    disabled = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with torch.random.fork_rng(devices=[]):
            yield
        if random_state() != numbers:
            raise TraceError(
                f"{type(model).__name__} draws random numbers in Python, so which path it takes "
                "may differ from call to call. Analyze it with that switched off (often in "
                "evaluation mode)"
            )
    finally:
        for logger, was in zip(loggers, disabled, strict=True):
            logger.disabled = was
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
