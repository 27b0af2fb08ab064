"""The structures of tables.h, field by field, and the constants that C++ and Python share."""

from __future__ import annotations

import ctypes
from typing import Any

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
Recipe = _struct(
    "Recipe",
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
Rates = _struct(
    "Rates",
    **dict.fromkeys(
        ("sign", "decay", "shrink", "rate", "keep", "take", "direct", "through"), DOUBLE
    ),
    **dict.fromkeys(("keep2", "take2", "root", "eps"), DOUBLE),
)
Update = _struct(
    "Update",
    **dict.fromkeys(("weight", "first", "second", "third"), POINTER),
    **_ints("dtype", "kind", "size", "width"),
    factors=POINTER,
)
Rest = _struct("Rest", **_ints("update", "block"))
Fused = _struct(
    "Fused",
    **dict.fromkeys(("updates", "gradients", "rates", "rates_of", "of_pass", "rest"), POINTER),
    rest_count=INT,
    **dict.fromkeys(("summed", "reach"), POINTER),
)
_STRUCTS = (
    *(Terms, Form, Source, Block, Pass, Touch, Group, Batch, Check, Write, Scaler, Recipe),
    *(Rates, Update, Rest, Fused),
)

TILE = 4096  # columns that a thread takes at a time
ALONE = 1 << 15  # entries of a matrix below which one thread is enough
MOST_SIDES = 16  # kinds of exponents in a group
CONSTANTS = {"ENORM_TILE": TILE, "ENORM_ALONE": ALONE, "ENORM_MOST_SIDES": MOST_SIDES}


def layout_checks() -> str:
    """C++ that does not compile unless tables.h has every field, by name, where it is here."""
    lines = [f'static_assert(sizeof(i64) == {ctypes.sizeof(INT)}, "i64");']
    for struct in _STRUCTS:
        name = struct.__name__
        lines.append(f'static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "{name}");')
        for field, _ in struct._fields_:  # type: ignore[misc]
            member, offset = field.rstrip("_"), getattr(struct, field).offset
            at = f"{name}, {member}"
            lines.append(f'static_assert(offsetof({at}) == {offset}, "{at}");')
    return "\n".join(["#include <cstddef>", *lines, ""])
