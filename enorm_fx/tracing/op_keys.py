"""One neutral op key for every spelling of an op: function, method, operator, ATen overload."""

from __future__ import annotations

import functools
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
    "fix": "trunc", "pos": "positive",
    "dsmm": "mm", "linalg_vector_norm": "vector_norm", "upsample": "interpolate",
    "upsample_nearest": "interpolate",
    "upsample_bilinear": "interpolate", "max_pool1d_with_indices": "max_pool1d",
    "max_pool2d_with_indices": "max_pool2d", "max_pool3d_with_indices": "max_pool3d",
    "feature_dropout": "dropout", "prelu_kernel": "prelu",
    "vdot": "dot",
}  # fmt: skip


# Ops of other libraries that are one of torch's.
_OF_LIBRARIES = {"transformers.grouped_mm_fallback": "grouped_mm"}

# torch and ATen order some arguments in another way than torch.nn.functional does: where each of
# the latter's stands in the former.
_ORDERS = {
    "embedding": (1, 0, 2),
    "batch_norm": (0, 3, 4, 1, 2, 5, 6, 7),
    "instance_norm": (0, 3, 4, 1, 2, 5, 6, 7),
}


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


@functools.cache
def _table() -> dict[Any, tuple[str, bool]]:
    """What each of torch's functions is. Made when first asked for; no thread sees a part of it."""
    table: dict[Any, tuple[str, bool]] = {}
    for space in _NAMESPACES:
        for name in dir(space):
            member = getattr(space, name, None)
            if not callable(member) or isinstance(member, type) or member in table:
                continue
            if space in (torch.special, torch.linalg) and hasattr(torch, name):
                continue  # torch.special.softmax and its like are other objects of the same name
            table[member] = _neutral(name)
    return table


def op_key(function: Any) -> tuple[str, bool]:
    """The neutral key of a function that a trace met, and whether it works in place.

    A function that is not torch's own keeps its qualified name, which no rule knows.
    """
    if isinstance(function, torch.nn.Module):  # called as one op, by a rule of the user's
        return module_key(type(function)), False
    if isinstance(function, _REGISTERED):
        namespace, name = _qualified(function).split("::")
        if namespace == "aten":
            return _neutral(name)
        return _OF_LIBRARIES.get(f"{namespace}.{name}", f"{namespace}.{name}"), False
    owner = getattr(function, "__self__", None)  # Tensor.T arrives as T.__get__
    if owner is not None and getattr(function, "__name__", "") in ("__get__", "__set__"):
        writes = function.__name__ == "__set__"  # y.data = x
        return f"set_{owner.__name__}" if writes else str(owner.__name__), writes
    try:
        return _table()[function]
    except (KeyError, TypeError):
        name = getattr(function, "__qualname__", "") or getattr(function, "__name__", "")
        return f"{getattr(function, '__module__', '')}.{name or repr(function)}".lstrip("."), False


_REGISTERED = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def _qualified(function: Any) -> str:
    """ "aten::relu" for torch.ops.aten.relu and each of its overloads."""
    is_overload = isinstance(function, torch._ops.OpOverload)
    return str(function._schema.name if is_overload else function._qualified_op_name)


def module_key(kind: type) -> str:
    """The op key of modules of a class that is not looked into."""
    return f"{kind.__module__}.{kind.__qualname__}"


def in_order(function: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The positional arguments of a call in the order of torch.nn.functional."""
    is_aten = isinstance(function, _REGISTERED)
    name = _qualified(function).split("::")[1] if is_aten else getattr(function, "__name__", "")
    if name not in _ORDERS or not (is_aten or function is getattr(torch, name)):
        return args
    return tuple(args[i] for i in _ORDERS[name] if i < len(args))
