"""Ops that reduce axes to one value, or accumulate along one."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from enorm_fx.rules.elementwise import bounded
from enorm_fx.rules.join import extremum
from enorm_fx.rules.registry import Context, rule
from enorm_fx.symmetry.labels import Label, LabelTerm, combine

# The factors of a product have labels of their own only up to this number.
_MOST_FACTORS = 64


def axes_of(x: Label, dim: Any) -> list[int]:
    """The reduced axes as non-negative numbers; all of them for None or ()."""
    ndim = len(x.shape)
    if dim is None or dim == ():
        return list(range(ndim))
    return [d % ndim for d in (dim if isinstance(dim, (tuple, list)) else [dim])] if ndim else []


def reduced(ctx: Context, x: Label, axes: list[int]) -> Label:
    """Reduce axes along which the entries must scale alike; the result's shape says keepdim."""
    return _without_axes(ctx, ctx.system.uniform(x, axes), axes)


def _without_axes(ctx: Context, label: Label, axes: list[int]) -> Label:
    """Axes of one id go away, or stay where the result's shape keeps them."""
    x, shape = label, ctx.shape
    if len(shape) == len(x.shape):
        return Label(shape, label.terms)

    def drop(ids: Tensor) -> Tensor:
        return ids.reshape([n for a, n in enumerate(ids.shape) if a not in axes])

    return label.map(shape, drop)


@rule("mean", "sum", "nanmean", "nansum", "amax", "amin")
def reduce(ctx: Context, input: Label, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The reduced entries must scale alike, and the result scales like them."""
    return reduced(ctx, input, axes_of(input, dim))


@rule("prod")
def product(
    ctx: Context, input: Label, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    """y = prod_k x[k] along an axis, or of all entries.

    Symmetry: y takes the sum of the labels along the axis. Of more than _MOST_FACTORS factors it
    is required that they scale alike. A product of no factors is 1 and pinned.
    """
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented  # rounds before it multiplies
    axes = axes_of(input, dim)
    count = math.prod(input.shape[a] for a in axes)
    if count == 0:
        return ctx.pinned(ctx.shape, "a product of no factors is 1")
    if count > _MOST_FACTORS:
        ctx.because(f"a product of more than {_MOST_FACTORS} factors, which must scale alike")
        input = ctx.system.uniform(input, axes)
    terms: list[LabelTerm] = []
    for term in input.terms:
        parts = [term.ids]
        for a in axes:
            parts = [part for ids in parts for part in ids.split(1, a)]
        repeats = count // len(parts)
        terms += [LabelTerm(term.coefficient * repeats, ids) for ids in parts]
    return _without_axes(ctx, Label(input.shape, combine(terms), input.wild), axes)


@rule("norm", "vector_norm")
def norm(
    ctx: Context, input: Label, p: Any = 2, dim: Any = None, keepdim: bool = False, *,
    ord: Any = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """Every norm scales like the entries, but for p = 0, which counts them."""
    if ord == 0 or p == 0:
        return NotImplemented
    return reduced(ctx, input, axes_of(input, dim))


@rule("var", "std")
def spread(ctx: Context, input: Label, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The standard deviation scales like the entries, the variance like their squares."""
    if isinstance(dim, bool):
        dim = None
    label = reduced(ctx, input, axes_of(input, dim))
    return label.times(2) if ctx.node is not None and ctx.node.op == "var" else label


@rule("max", "min")
def extreme(ctx: Context, input: Label, dim: Any = None, keepdim: bool = False,
            other: Any = None) -> Any:  # fmt: skip
    """Of one tensor or along an axis a reduction; of two tensors the larger or smaller entry."""
    if isinstance(dim, Label) or isinstance(other, Label):
        return extremum(ctx, input, dim if isinstance(dim, Label) else other)
    label = reduced(ctx, input, axes_of(input, dim))
    return (label, Label(ctx.shape)) if isinstance(ctx.out, tuple) else label


@rule("median", "nanmedian", "mode", "kthvalue", "topk", "sort")
def selection(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Any:
    """Entries picked by rank along an axis: all axes must scale alike there to be ranked."""
    label = ctx.system.uniform(input, range(len(input.shape)))
    if not isinstance(ctx.out, tuple):
        return Label(ctx.shape, tuple(_fit(label, len(ctx.shape))))
    first, *rest = ctx.out
    return (
        Label(first.shape, tuple(_fit(label, len(first.shape)))),
        *(Label(spec.shape) for spec in rest),
    )


def _fit(label: Label, ndim: int) -> Any:
    for term in label.terms:
        yield LabelTerm(term.coefficient, term.ids.reshape((1,) * ndim))


@rule("argmax", "argmin", "argsort")
def position(ctx: Context, input: Label, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Positions do not scale; the entries that are compared must scale alike."""
    ctx.system.uniform(input, axes_of(input, dim))
    return Label(ctx.shape)


@rule("diff")
def difference(ctx: Context, input: Label, n: int = 1, dim: int = -1, *args: Any) -> Any:
    """Differences of neighbours along an axis: they must scale alike."""
    if args:
        return NotImplemented  # further tensors are put before and after
    return Label(ctx.shape, ctx.system.uniform(input, axes_of(input, dim)).terms)


@rule("cumsum", "cummax", "cummin", "logcumsumexp")
def accumulate(ctx: Context, input: Label, dim: int, *args: Any, **kwargs: Any) -> Any:
    """Entries accumulated along an axis must scale alike."""
    if ctx.node is not None and ctx.node.op == "logcumsumexp":
        return bounded(ctx, input)
    label = ctx.system.uniform(input, axes_of(input, dim))
    return (label, Label(ctx.shape)) if isinstance(ctx.out, tuple) else label
