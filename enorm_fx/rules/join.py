"""Ops that bring several tensors together: sums, products, concatenation, selection."""

from __future__ import annotations

from typing import Any

import torch

from enorm_fx.rules.registry import Context, Flow, rule
from enorm_fx.symmetry.labels import Label, LabelTerm, add
from enorm_fx.tracing.trace import Node

_CONSTANT = "a constant is added"


@rule("add", "sub", flow=Flow.SUM)
def join(ctx: Context, input: Any, other: Any, alpha: Any = 1, out: Any = None) -> Any:
    """x + alpha * y, x - y: both must scale alike, and so does the result.

    A number other than zero pins the tensor that it is added to.
    """
    numbers = [x for x in (input, other) if not isinstance(x, Label)]
    labels = [ctx.known(x) for x in (input, other) if isinstance(x, Label)]
    if not labels or isinstance(alpha, Label):
        return NotImplemented
    if any(n != 0 for n in numbers):
        ctx.pin(labels[0], _CONSTANT)
    return equalized(ctx, labels)


@rule("rsub", flow=Flow.SUM)
def reversed_sub(ctx: Context, input: Label, other: Any, alpha: Any = 1) -> Any:
    """y - x."""
    return join(ctx, input, other)


@rule("maximum", "minimum", "fmax", "fmin", flow=Flow.SUM)
def extremum(ctx: Context, input: Label, other: Label) -> Any:
    """The larger or smaller entry: both must scale alike."""
    return equalized(ctx, [input, other])


@rule("lerp", flow=Flow.SUM)
def lerp(ctx: Context, input: Label, end: Label, weight: Any) -> Any:
    """x + w (y - x): both must scale alike; the weight stays as it is."""
    if isinstance(weight, Label):
        ctx.pin(ctx.known(weight), "'lerp' weighs by it")
    return equalized(ctx, [input, end])


def equalized(ctx: Context, labels: list[Label]) -> Label:
    """One label for tensors that are added, compared or chosen between."""
    labels = [_zeros_fit_all(ctx, label) for label in labels]
    tied = [label for label in labels if not label.wild]
    if not tied:
        return Label(ctx.shape, wild=True)
    if any(not label.terms for label in tied):
        ctx.because("it meets a tensor that keeps its values")
    best = max(tied, key=_detail)
    for label in tied:
        if label is not best:
            ctx.system.equal(best, label)
    return add(ctx.shape, best)


def _detail(label: Label) -> int:
    """How many entries the ids tell apart: the label that says most is passed on."""
    if not label.terms:
        return 0
    return int(torch.broadcast_shapes(*(t.ids.shape for t in label.terms)).numel())


def _zeros_fit_all(ctx: Context, label: Label) -> Label:
    """A constant that is zero everywhere carries every label."""
    if label.terms or label.wild or label.node < 0:
        return label
    value = ctx.value(label)
    if value is not None and not bool(value.any()):
        return Label(label.shape, wild=True)
    return label


@rule("mul", flow=Flow.PRODUCT)
def multiply(ctx: Context, input: Any, other: Any) -> Any:
    """x * y: labels add up; a number changes nothing."""
    labels = [ctx.known(x) for x in (input, other) if isinstance(x, Label)]
    return add(ctx.shape, *labels)


@rule("div", flow=Flow.ENTRIES)
def divide(ctx: Context, input: Any, other: Any, rounding_mode: Any = None) -> Any:
    """x / y: the label of x less that of y."""
    if rounding_mode is not None:
        return NotImplemented
    labels = [ctx.known(input)] if isinstance(input, Label) else []
    if isinstance(other, Label):
        labels.append(-ctx.known(other))
    return add(ctx.shape, *labels)


@rule("rdiv", flow=Flow.ENTRIES)
def reversed_divide(ctx: Context, input: Label, other: Any) -> Any:
    """y / x."""
    return divide(ctx, other, input)


@rule("addcmul", "addcdiv", flow=Flow.ENTRIES)
def add_product(ctx: Context, input: Label, tensor1: Label, tensor2: Label, value: Any = 1) -> Any:
    """x + value * a * b, or x + value * a / b."""
    second = -tensor2 if ctx.node is not None and ctx.node.op == "addcdiv" else tensor2
    return equalized(ctx, [input, add(ctx.shape, tensor1, second)])


@rule("cat", flow=Flow.MOVES)
def concatenate(ctx: Context, tensors: Any, dim: int = 0) -> Any:
    """Tensors side by side along an axis: each keeps its label."""
    labels = [_zeros_fit_all(ctx, label) for label in tensors if label.shape != (0,)]
    return side_by_side(ctx, labels, dim % len(ctx.shape), ctx.shape)


@rule("hstack", "vstack", "dstack", "column_stack", "row_stack", flow=Flow.MOVES)
def stack_columns(ctx: Context, tensors: Any) -> Any:
    """Concatenation along the last, first or third axis for tensors with enough axes."""
    op = ctx.node.op if ctx.node is not None else ""
    ndim = len(ctx.shape)
    axis = min({"hstack": 1, "column_stack": 1, "dstack": 2}.get(op, 0), ndim - 1)
    if any(len(label.shape) != ndim for label in tensors):
        return NotImplemented
    return side_by_side(ctx, list(tensors), axis, ctx.shape)


@rule("stack", flow=Flow.MOVES)
def stack(ctx: Context, tensors: Any, dim: int = 0) -> Any:
    """Tensors side by side along a new axis."""
    axis = dim % len(ctx.shape)
    labels = [
        _zeros_fit_all(ctx, x).map(
            (*x.shape[:axis], 1, *x.shape[axis:]), lambda ids: ids.unsqueeze(axis)
        )
        for x in tensors
    ]
    return side_by_side(ctx, labels, axis, ctx.shape)


def side_by_side(ctx: Context, labels: list[Label], axis: int, shape: tuple[int, ...]) -> Label:
    """The label of a concatenation: term by term, filled up with a variable that is zero."""
    parts = [_terms_by_coefficient(ctx, label, axis) for label in labels]
    terms = []
    for coefficient in dict.fromkeys(c for part in parts for c in part):
        for k in range(max(len(part.get(coefficient, ())) for part in parts)):
            pieces = []
            for label, part in zip(labels, parts, strict=True):
                have = part.get(coefficient, [])
                ids = have[k] if k < len(have) else _nil(ctx, len(shape))
                sizes = list(ids.shape)
                sizes[axis] = label.shape[axis]
                pieces.append(ids.expand(sizes))
            terms.append(LabelTerm(coefficient, _concatenate_ids(pieces, axis)))
    return Label(shape, tuple(terms))


def _terms_by_coefficient(ctx: Context, label: Label, axis: int) -> dict[int, list[torch.Tensor]]:
    if label.wild:  # zeros: any scale will do, for each slice
        sizes = [1] * len(label.shape)
        sizes[axis] = label.shape[axis]
        return {1: [ctx.system.fresh(*sizes)]}
    result: dict[int, list[torch.Tensor]] = {}
    for term in label.terms:
        result.setdefault(term.coefficient, []).append(term.ids)
    return result


def _nil(ctx: Context, ndim: int) -> torch.Tensor:
    return ctx.system.nil.reshape((1,) * ndim)


def _concatenate_ids(pieces: list[torch.Tensor], axis: int) -> torch.Tensor:
    sizes = [max(p.shape[a] for p in pieces) for a in range(pieces[0].ndim)]
    grown = [
        p.expand([p.shape[a] if a == axis else n for a, n in enumerate(sizes)]) for p in pieces
    ]
    joined = torch.cat(grown, dim=axis)
    first = joined.narrow(axis, 0, 1)
    return first if bool((joined == first).all()) else joined


@rule("where", flow=Flow.ENTRIES)
def where(ctx: Context, condition: Label, input: Any, other: Any) -> Any:
    """One or the other, entry by entry: both must scale alike, the condition not at all."""
    if ctx.node is not None and _is_mask(ctx.node.args, 1) and not _is_mask(ctx.node.args, 0):
        condition, input = input, condition  # x.where(condition, other)
    ctx.pin(condition, "a condition decides by it")
    return _choice(ctx, [input, other])


def _is_mask(args: tuple[Any, ...], k: int) -> bool:
    return k < len(args) and isinstance(args[k], Node) and args[k].out.dtype == torch.bool


@rule("masked_fill", flow=Flow.ENTRIES)
def masked_fill(ctx: Context, input: Label, mask: Label, value: Any) -> Any:
    """Entries replaced by a number: zero and the infinities fit every scale."""
    if isinstance(value, Label):
        return _choice(ctx, [input, value])
    if value not in (0, float("inf"), float("-inf")):
        ctx.pin(input, f"entries are replaced by {value}")
    return add(ctx.shape, input)


def _choice(ctx: Context, values: list[Any]) -> Any:
    labels = [ctx.known(v) for v in values if isinstance(v, Label)]
    numbers = [v for v in values if not isinstance(v, Label)]
    if not labels:
        return Label(ctx.shape)
    if any(n != 0 for n in numbers):
        ctx.pin(labels[0], f"entries are replaced by {numbers[0]}")
    return equalized(ctx, labels)


@rule("eq", "ne", "lt", "le", "gt", "ge", flow=Flow.ENTRIES)
def compare(ctx: Context, input: Any, other: Any) -> Any:
    """A comparison with zero does not see the scale; two tensors must scale alike."""
    values = [ctx.known(v) for v in (input, other) if isinstance(v, Label)]
    if any(not isinstance(v, Label) and v != 0 for v in (input, other)):
        ctx.pin(values[0], "it is compared with a number")
    if len(values) == 2:
        equalized(ctx, values)
    return Label(ctx.shape)


@rule("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "logical_and", "logical_or",
      "logical_not", "logical_xor", flow=Flow.ENTRIES)  # fmt: skip
def logic(ctx: Context, input: Any, other: Any = None) -> Any:
    """Booleans and integers carry no scale; of a number only whether it is zero is read."""
    return Label(ctx.shape)
