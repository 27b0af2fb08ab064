"""Ops that write into a tensor, or give a copy of it into which something is written.

Memory keeps one label: what is written must scale like what was there. Where zeros were there, any
label fits, and what is written first decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from enorm_fx.rules.join import equalized
from enorm_fx.rules.registry import Context, rule
from enorm_fx.rules.shape import gathered, picked, selected
from enorm_fx.symmetry.labels import Label


@rule("copy")
def copy(ctx: Context, input: Label, other: Label, non_blocking: bool = False) -> Any:
    """x.copy_(y): y must scale like what was there."""
    return equalized(ctx, [input, other])


@rule("zero")
def zero(ctx: Context, input: Label) -> Any:
    """x.zero_(): zeros fit the label that was there."""
    return Label(ctx.shape, input.terms)


@rule("setitem")
def setitem(ctx: Context, input: Label, index: Any, value: Any) -> Any:
    """x[index] = value."""
    result = _written(ctx, input, lambda x: picked(ctx, x, index), value)
    return result if result is NotImplemented else None


@rule("index_add", "index_copy")
def index_add(
    ctx: Context, input: Label, dim: int, index: Label, source: Label, *, alpha: Any = 1
) -> Any:
    """Slices of source are added to those of x that an index names, or take their places."""
    if isinstance(alpha, Label) or not input.shape:
        return NotImplemented
    shape = source.shape
    return _written(ctx, input, lambda x: selected(ctx, x, dim, index, shape), source)


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(
    ctx: Context,
    input: Label,
    dim: int,
    index: Label,
    src: Any = None,
    reduce: str | None = None,
    *,
    value: Any = None,
    include_self: bool = True,
) -> Any:
    """x[..., index[..., i, ...], ...] takes src[..., i, ...], or they are added up or compared.

    Beside what scatters may be more of src than index has entries for; that is not read.
    """
    if reduce in ("multiply", "prod") or not input.shape:
        return NotImplemented
    src = value if src is None else src
    if isinstance(src, Label) and src.shape:
        sizes = index.shape
        shape = tuple(slice(n) for n in sizes)
        src = src.map(sizes, lambda ids: ids[shape])
    return _written(ctx, input, lambda x: gathered(ctx, x, dim, index), src)


@rule("index_put")
def index_put(
    ctx: Context, input: Label, indices: Any, values: Label, accumulate: bool = False
) -> Any:
    """x[indices] = values, or += values, as a function."""
    items = tuple(slice(None) if item is None else item for item in indices)
    return _written(ctx, input, lambda x: picked(ctx, x, items), values)


@rule("slice_scatter")
def slice_scatter(
    ctx: Context,
    input: Label,
    src: Label,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Any:
    """A copy of x in which src takes the place of a range of an axis."""
    items = _on_axis(input, dim, slice(start, end, step))
    return _written(ctx, input, lambda x: picked(ctx, x, items), src)


@rule("select_scatter")
def select_scatter(ctx: Context, input: Label, src: Label, dim: int, index: int) -> Any:
    """A copy of x in which src takes the place of one slice of an axis."""
    items = _on_axis(input, dim, index)
    return _written(ctx, input, lambda x: picked(ctx, x, items), src)


def _on_axis(x: Label, dim: int, item: Any) -> tuple[Any, ...]:
    axis = dim % len(x.shape)
    return tuple(item if a == axis else slice(None) for a in range(len(x.shape)))


def _written(ctx: Context, x: Label, part_of: Callable[[Label], Any], value: Any) -> Any:
    """The label of x after value, a tensor or a number, was written into a part of it."""
    x = ctx.decided(x)
    part = part_of(x)
    if not isinstance(part, Label):
        return NotImplemented
    ctx.because("it is written where the entries scale otherwise")
    if isinstance(value, Label):
        ctx.system.equal(ctx.known(value), part)
    elif value is None:
        return NotImplemented
    elif value != 0:
        ctx.pin(part, f"{value} is written into it")
    return Label(ctx.shape, x.terms)
