"""While a model is traced, `type(x)` tells its code that a fake tensor is a torch.Tensor.

The tensors of a run are of a class of their own. Code that looks at the very class of a tensor, as
in `type(x) is torch.Tensor`, would go another way than on real ones; `isinstance` needs no care.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_STAND_INS = "torch._subclasses"  # where the classes are that stand for tensors
# What a module that works with tensors has among its names.
_ABOUT_TENSORS = {"torch": torch, "Tensor": Tensor, "nn": nn, "Parameter": nn.Parameter}


class _Type:
    """Stands for the builtin `type` wherever code uses that."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = type(*args, **kwargs)
        if len(args) == 1 and issubclass(made, Tensor) and _in_this_thread.runs:
            return Tensor if made.__module__.startswith(_STAND_INS) else made
        return made

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, type)

    def __subclasscheck__(self, kind: type) -> bool:
        return issubclass(kind, type)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type]:
        return (type,)

    def __getattr__(self, name: str) -> Any:
        return getattr(type, name)

    def __eq__(self, other: object) -> bool:
        return other is type or other is self

    def __hash__(self) -> int:
        return hash(type)

    def __getitem__(self, kind: Any) -> Any:
        return type[kind]

    def __or__(self, other: Any) -> Any:
        return type | other


class _Runs(threading.local):
    runs = 0


_in_this_thread = _Runs()
_TYPE = _Type()
_lock = threading.Lock()
_everywhere = 0  # in how many threads, nested ones counted too
_changed: list[dict[str, Any]] = []


@contextmanager
def plain_types(model: nn.Module) -> Iterator[None]:
    """In this block and thread, `type(x)` in modules that work with tensors shows no fake ones."""
    global _everywhere
    with _lock:
        _everywhere += 1
        _change(model)
    _in_this_thread.runs += 1
    try:
        yield
    finally:
        _in_this_thread.runs -= 1
        with _lock:
            _everywhere -= 1
            while not _everywhere and _changed:
                del _changed.pop()["type"]


def _change(model: nn.Module) -> None:
    for namespace in _namespaces(model):
        if "type" not in namespace:
            namespace["type"] = _TYPE
            _changed.append(namespace)


def _namespaces(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The global names of the model's code, and of whatever else works with tensors."""
    for path, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and not _is_torchs(path):
            names = module.__dict__
            if any(names.get(name) is about for name, about in _ABOUT_TENSORS.items()):
                yield names
    for kind in {type(module) for module in model.modules()}:
        names = getattr(getattr(kind, "forward", None), "__globals__", {})
        if names and not _is_torchs(names.get("__name__", "")):
            yield names


def _is_torchs(name: str) -> bool:
    return name.partition(".")[0] in ("torch", __name__.partition(".")[0])
