"""The structures of tables.h, field by field, and the compiled library that reads them."""

from __future__ import annotations

import ctypes
from typing import Any

from enorm_fx.step.native import compiler

INT, DOUBLE, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def _ints(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, INT)


Terms = _struct("Terms", **_ints("count", "length"), power=POINTER, first=POINTER, ids=POINTER)
Form = _struct("Form", **_ints("rows", "cols", "run"), row=Terms, col=Terms)
Source = _struct("Source", data=POINTER, **_ints("dtype", "form"))
Block = _struct(
    "Block",
    **_ints("source", "form"),
    sums=POINTER,
    wide=INT,
    weight=DOUBLE,
    **_ints("removed_count", "picked_count", "picked_from"),
    removed=POINTER,
    picked=POINTER,
    rate=DOUBLE,
    limit=DOUBLE,
)
Pass = _struct("Pass", **_ints("block", "over_rows", "first"), out=POINTER)
Touch = _struct(
    "Touch",
    **_ints("pass_", "side", "count", "position", "channel"),
    positions=POINTER,
    channels=POINTER,
)
Group = _struct(
    "Group",
    **_ints("start", "channels", "touch_begin", "touch_end", "positive", "negative", "symmetric"),
    damping=DOUBLE,
    coefficients=POINTER,
    sides=POINTER,
)
Batch = _struct("Batch", **_ints("pass_begin", "pass_end", "group_begin", "group_end", "alone"))
Check = _struct("Check", source=INT, rate=DOUBLE, limit=DOUBLE)
Write = _struct("Write", **_ints("source", "scaler"))
Scaler = _struct("Scaler", **_ints("form", "exponent", "wide"), row=POINTER, col=POINTER)
Job = _struct(
    "Job",
    **_ints("scales", "cycles", "threads", "exact", "power_count", "product_count"),
    p=DOUBLE,
    farthest=DOUBLE,
    **dict.fromkeys(("coefficients", "products", "product"), POINTER),
    **dict.fromkeys(("e", "d", "steps", "totals", "scratch"), POINTER),
    scratch_width=INT,
    forms=POINTER,
    sources=POINTER,
    blocks=POINTER,
    block_count=INT,
    passes=POINTER,
    touches=POINTER,
    groups=POINTER,
    batches=POINTER,
    batch_count=INT,
    checks=POINTER,
    check_count=INT,
    scalers=POINTER,
    scaler_count=INT,
    writes=POINTER,
    write_count=INT,
)
_MIRRORED = (
    Terms, Form, Source, Block, Pass, Touch, Group, Batch, Check, Write, Scaler, Job,
    INT,
)  # fmt: skip


def library() -> ctypes.CDLL:
    """The compiled library. Raises CompilerError, also if it declares other structures."""
    loaded = compiler.load()
    sizes = (INT * len(_MIRRORED))()
    loaded.enorm_sizes(ctypes.byref(sizes))
    if list(sizes) != [ctypes.sizeof(struct) for struct in _MIRRORED]:
        raise compiler.CompilerError("tables.h and tables.py do not declare the same structures")
    return loaded
