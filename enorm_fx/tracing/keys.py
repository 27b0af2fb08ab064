"""One neutral op key for every spelling of an op: function, method, operator, ATen overload."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

# Where a spelling of an op may live. Identity decides, never the name alone: a user's own
# function that happens to be called "relu" is not ours to know.
_NAMESPACES: tuple[Any, ...] = (
    torch.Tensor, F, torch, torch._C._nn, torch.special, torch.linalg, torch._VF
)  # fmt: skip

# Spellings whose names differ from the op's usual name.
_SYNONYMS = {
    "truediv": "div", "divide": "div", "true_divide": "div", "rtruediv": "rdiv",
    "multiply": "mul", "subtract": "sub", "rsub": "rsub", "absolute": "abs", "negative": "neg",
    "concat": "cat", "concatenate": "cat", "swapaxes": "transpose", "swapdims": "transpose",
    "moveaxis": "movedim", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    "invert": "bitwise_not", "greater": "gt", "greater_equal": "ge", "less": "lt",
    "less_equal": "le", "not_equal": "ne", "float_power": "pow", "clip": "clamp",
    "fix": "trunc", "pos": "positive", "dsmm": "mm", "upsample": "interpolate", "upsample_nearest": "interpolate",
    "upsample_bilinear": "interpolate", "max_pool1d_with_indices": "max_pool1d",
    "max_pool2d_with_indices": "max_pool2d", "max_pool3d_with_indices": "max_pool3d",
    "feature_dropout": "dropout", "prelu_kernel": "prelu",
}  # fmt: skip


# Functions whose arguments stand in another order in torch and ATen than in torch.nn.functional.
_REORDERED = {"embedding": "embedding_lookup", "batch_norm": "batch_norm_flat",
              "instance_norm": "instance_norm_flat"}  # fmt: skip


def _neutral(name: str) -> tuple[str, bool]:
    """(op key, does it write into its first argument) for the name of a torch function."""
    inplace = False
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        if name in _INPLACE_OPERATORS:
            name, inplace = name[1:], True
        elif name == "setitem":
            inplace = True
    elif name.endswith("_") and not name.endswith("__"):
        name, inplace = name[:-1], True
    name = name.lstrip("_")
    return _SYNONYMS.get(name, name), inplace


_INPLACE_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "idiv", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"}
)


def _table() -> dict[Any, tuple[str, bool]]:
    table: dict[Any, tuple[str, bool]] = {}
    for space in _NAMESPACES:
        for name in dir(space):
            member = getattr(space, name, None)
            if not callable(member) or isinstance(member, type) or member in table:
                continue
            if space in (torch.special, torch.linalg) and hasattr(torch, name):
                continue  # torch.special.softmax and its like are other objects of the same name
            table[member] = _neutral(name)
    for name, key in _REORDERED.items():
        table[getattr(torch, name)] = (key, False)
    return table


_TABLE: dict[Any, tuple[str, bool]] = {}


def op_key(function: Any) -> tuple[str, bool]:
    """The neutral key of a function that a trace met, and whether it works in place.

    A function that is not torch's own keeps its qualified name, which no rule knows.
    """
    if not _TABLE:
        _TABLE.update(_table())
    if isinstance(function, torch._ops.OpOverload):
        namespace, name = function._schema.name.split("::")
        if namespace != "aten":
            return f"{namespace}.{name}", False
        return (_REORDERED[name], False) if name in _REORDERED else _neutral(name)
    owner = getattr(function, "__self__", None)  # Tensor.T arrives as T.__get__
    if getattr(function, "__name__", "") == "__get__" and owner is not None:
        return str(owner.__name__), False
    try:
        return _TABLE[function]
    except (KeyError, TypeError):
        name = getattr(function, "__qualname__", None) or getattr(function, "__name__", "")
        return f"{getattr(function, '__module__', '')}.{name or function!r}".lstrip("."), False
