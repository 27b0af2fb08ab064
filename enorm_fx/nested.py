"""Nested values: whatever a call takes or gives, tuples of lists of dicts of tensors.

Two walkers serve the whole library: `instances` finds, `replaced` changes. Both look into tuples,
lists, dicts and slices, which is where torch's own calls keep their tensors. What a *model* takes
and gives may be anything; `tensors_anywhere` looks into objects too.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Collection, Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

from torch import Tensor
from torch.nn import Module

T = TypeVar("T")

_DEEPEST = 8
_PLAIN = (type(None), int, float, complex, str, bytes, type)


def instances(kind: type[T], value: Any) -> Iterator[T]:
    """Every instance of a class in nested tuples, lists, dicts and slices, in order."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from instances(kind, item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from instances(kind, item)
    elif isinstance(value, slice):
        yield from instances(kind, (value.start, value.stop, value.step))


def replaced(kind: type[T], value: Any, change: Callable[[T], Any]) -> Any:
    """The same nested value with `change(item)` in place of every instance of a class."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (tuple, list)):
        items = [replaced(kind, item, change) for item in value]
        return items if isinstance(value, list) else _like(value, items)
    if isinstance(value, dict):
        return {key: replaced(kind, item, change) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(
            *(replaced(kind, item, change) for item in (value.start, value.stop, value.step))
        )
    return value


def _like(value: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    """A tuple of the items, with names where the original has them."""
    named = hasattr(value, "_fields")
    return type(value)(*items) if named else tuple(items)


def tensors_anywhere(value: Any, depth: int = 0, skip: Collection[int] = ()) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, sets, mappings, functions, iterators and objects.

    Objects are searched too: a model may return its own class, and a tensor that leaves it
    unseen would be rescaled silently. skip: identities of objects that are not looked into.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, _PLAIN) or depth > _DEEPEST or id(value) in skip:
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_anywhere(item, depth + 1, skip)
    elif isinstance(value, (tuple, list, set, frozenset)):
        for item in value:
            yield from tensors_anywhere(item, depth + 1, skip)
    elif isinstance(value, slice):
        yield from tensors_anywhere((value.start, value.stop, value.step), depth + 1, skip)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_anywhere(getattr(value, field.name, None), depth + 1, skip)
    elif not isinstance(value, _CODE):
        for item in _held_by(value):
            yield from tensors_anywhere(item, depth + 1, skip)


def _held_by(value: Any) -> Iterator[Any]:
    """What an object holds: attributes, what a function closes over, what an iterator will give."""
    yield from (getattr(value, "__dict__", None) or {}).values()
    if isinstance(value, FunctionType):
        yield value.__defaults__
        yield value.__kwdefaults__
        yield from gc.get_referents(*(value.__closure__ or ()))  # the contents of the cells
    elif isinstance(value, MethodType):
        yield value.__self__
        yield value.__func__
    elif type(value).__module__ in _HOLDERS:
        yield from gc.get_referents(value)
    else:
        for kind in type(value).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                yield getattr(value, name, None)


_CODE = (ModuleType, CodeType, BuiltinFunctionType, Module)  # none of a model's results
_HOLDERS = ("builtins", "collections", "functools", "itertools")  # generators, views, partial
