"""Run a model without leaving a trace in it: modules, random numbers, logs."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from enorm_fx.errors import TraceError
from enorm_fx.nested import tensors_anywhere

# What a model's own code may raise on inputs that it does not accept.
FOREIGN = (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError,
           ArithmeticError)  # fmt: skip

# Torch logs whole tracebacks and graphs for what is an ordinary "no" here: our error says it.
_LOUD = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.export",
         "torch._export", "torch._functorch")  # fmt: skip


class Snapshot:
    """What the modules of a model hold, to see what a run changed and to put it back."""

    def __init__(self, model: nn.Module) -> None:
        self._saved: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []
        for path, module in model.named_modules():
            self._saved.append((path, module.__dict__, dict(module.__dict__)))
            for value in module.__dict__.values():
                self._save(value)

    def _save(self, value: Any, depth: int = 0) -> None:
        """Note what containers, and containers in them, hold now."""
        if type(value) in (dict, list, set) and depth < _NESTED:
            self._contents.append((value, value.copy()))
            for item in value.values() if isinstance(value, dict) else value:
                self._save(item, depth + 1)
        elif _is_plain_object(value) and depth < _NESTED:
            self._save(value.__dict__, depth + 1)

    def new_tensors(self) -> Iterator[tuple[Tensor, str]]:
        """Fake tensors that the model keeps after the run, with the attribute that holds them."""
        for path, current, saved in self._saved:
            for name, value in current.items():
                if name == "_modules" or (value is saved.get(name) and not _is_container(value)):
                    continue
                for tensor in tensors_anywhere(value):
                    if isinstance(tensor, FakeTensor):
                        yield tensor, f"'{path}.{name}'".replace("'.", "'")

    def restore(self) -> None:
        """Put everything back, the contents of lists, dicts and sets too."""
        for _, current, saved in self._saved:
            current.clear()
            current.update(saved)
        for container, copy in self._contents:
            container.clear()
            container.extend(copy) if isinstance(container, list) else container.update(copy)


_NESTED = 4  # how deep containers in attributes of modules are looked into


def _is_plain_object(value: Any) -> bool:
    """An object of a user's own class, which may hold tensors."""
    own = type(value).__module__.partition(".")[0] not in ("builtins", "torch", "functools")
    return (
        own
        and not isinstance(value, (type, nn.Module))
        and type(getattr(value, "__dict__", None)) is dict
    )


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple, set)) or _is_plain_object(value)


def random_state() -> tuple[Any, ...]:
    """What changes when random numbers are drawn in Python or numpy."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    _, words, *rest = numpy.random.get_state()
    return (random.getstate(), words.tobytes(), *rest)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[Snapshot]:
    """Whatever the run leaves in the modules, does to the RNG or logs is undone or kept quiet."""
    snapshot = Snapshot(model)
    python_state, numbers = random.getstate(), random_state()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    loggers = [logging.getLogger(name) for name in _LOUD]
    disabled = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with torch.random.fork_rng(devices=[]):
            yield snapshot
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
        snapshot.restore()
