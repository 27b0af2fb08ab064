"""Find tensors inside whatever a model takes or returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

_MAX_DEPTH = 8
_PLAIN = (type(None), int, float, complex, str, bytes, type)


def tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, sets, mappings, dataclasses and plain objects.

    Objects are searched too: a model may return its own class, and a tensor that leaves it
    unseen would be rescaled silently.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, _PLAIN) or depth > _MAX_DEPTH:
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth + 1)
    elif isinstance(value, (tuple, list, set, frozenset)):
        for item in value:
            yield from tensors_in(item, depth + 1)
    elif isinstance(value, slice):
        yield from tensors_in((value.start, value.stop, value.step), depth + 1)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name, None), depth + 1)
    elif type(value).__module__.partition(".")[0] not in ("builtins", "torch", "functools"):
        yield from tensors_in(getattr(value, "__dict__", None), depth + 1)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nested tuples, lists and dicts with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, change) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


def describe(call: Any) -> str:
    """The shapes of the inputs of a call, for messages."""
    return ", ".join(f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in tensors_in(call))
