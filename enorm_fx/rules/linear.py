"""Contractions: linear layers, convolutions, matrix products, embeddings.

A sum over an axis scales only if every summand does so alike: the terms that vary along the
contracted axis must cancel, the others pass. A weight that is met for the first time takes
exactly what its input asks for on its input side, and a fresh variable per output slice, so
most layers need no equation at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from enorm_fx.rules.registry import Context, rule
from enorm_fx.symmetry.labels import Label, LabelTerm, add, expand_dims, squeeze_constant


def contract(ctx: Context, product: Label, axis: int) -> Label:
    """The label of a sum of products along an axis, which the result does not have."""
    label = ctx.system.uniform(product, [axis])
    shape = list(label.shape)
    del shape[axis]
    return label.map(shape, lambda ids: ids.squeeze(axis))


def add_bias(ctx: Context, y: Label, bias: Label | None, axis: int) -> Label:
    """y + bias, the bias along one axis of y: it takes the label of what it is added to."""
    if bias is None:
        return y
    axis %= len(y.shape)
    after = (1,) * (len(y.shape) - 1 - axis)
    if ctx.parameter_name(bias) is not None and ctx.biases == "skip":
        ctx.ignore(y)
        return y
    if ctx.is_new(bias) and all(_only_along(t.ids, axis) for t in y.terms):
        terms = [LabelTerm(t.coefficient, t.ids.reshape(-1)) for t in y.terms]
        ctx.define(bias, terms)
        return y
    if ctx.is_new(bias):
        bias = ctx.define(bias, [LabelTerm(1, ctx.system.fresh(*bias.shape))])
    aligned = bias.map((*bias.shape, *after), lambda ids: ids.reshape(*ids.shape, *after))
    ctx.system.equal(y, aligned)
    return y


def _only_along(ids: Tensor, axis: int) -> bool:
    return all(n == 1 for a, n in enumerate(ids.shape) if a != axis)


def moving(x: Label, axis: int) -> list[LabelTerm]:
    """The terms of x that vary along an axis, as ids along that axis alone."""
    return [
        LabelTerm(t.coefficient, t.ids.transpose(axis, -1).reshape(-1, x.shape[axis])[0])
        for t in x.terms
        if t.ids.shape[axis] > 1
    ]


@rule("linear", weights=("weight", "bias"))
def linear(ctx: Context, input: Label, weight: Label, bias: Label | None = None) -> Label:
    """y[..., o] = sum_i x[..., i] weight[o, i] + bias[o].

    Shapes:   x (*, I), weight (O, I), bias (O,), y (*, O).
    Symmetry: weight[o, i] takes r[o] - x[i]; bias[o] and y[..., o] take r[o].
    """
    if ctx.is_new(weight):
        fresh = LabelTerm(1, ctx.system.fresh(weight.shape[0], *(1,) * (len(weight.shape) - 1)))
        inner = [LabelTerm(-t.coefficient, t.ids.reshape(1, -1)) for t in moving(input, -1)]
        if len(weight.shape) == 1:
            fresh = LabelTerm(1, ctx.system.scalar(1))
            inner = [LabelTerm(t.coefficient, t.ids.reshape(-1)) for t in inner]
        weight = ctx.define(weight, [fresh, *inner])
    if len(weight.shape) == 1:  # (I,): the output axis is left out
        product = add(torch_broadcast(input.shape, weight.shape), input, weight)
        return add_bias_scalar(ctx, contract(ctx, product, len(product.shape) - 1), bias)
    x = input.map((*input.shape[:-1], 1, input.shape[-1]), lambda ids: ids.unsqueeze(-2))
    product = add((*input.shape[:-1], *weight.shape), x, weight)
    y = contract(ctx, product, len(product.shape) - 1)
    return add_bias(ctx, y, bias, -1)


def torch_broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape that the given shapes broadcast to."""
    return tuple(torch.broadcast_shapes(*shapes))


def add_bias_scalar(ctx: Context, y: Label, bias: Label | None) -> Label:
    """y + bias for a bias of one element."""
    if bias is not None:
        if ctx.is_new(bias):
            bias = ctx.define(bias, [LabelTerm(1, ctx.system.scalar(len(bias.shape)))])
        ctx.system.equal(y, bias)
    return y


@rule("bilinear", weights=("weight", "bias"))
def bilinear(
    ctx: Context, input1: Label, input2: Label, weight: Label, bias: Label | None = None
) -> Label:
    """y[..., o] = sum_ij a[..., i] weight[o, i, j] b[..., j] + bias[o].

    Shapes:   a (*, I), b (*, J), weight (O, I, J), bias (O,), y (*, O).
    Symmetry: weight[o, i, j] takes r[o] - a[i] - b[j]; bias[o] and y[..., o] take r[o].
    """
    if ctx.is_new(weight):
        terms = [LabelTerm(1, ctx.system.fresh(weight.shape[0], 1, 1))]
        for x, shape in ((input1, (1, -1, 1)), (input2, (1, 1, -1))):
            terms += [LabelTerm(-t.coefficient, t.ids.reshape(shape)) for t in moving(x, -1)]
        weight = ctx.define(weight, terms)
    batch = input1.shape[:-1]
    a = input1.map((*batch, 1, input1.shape[-1], 1), lambda i: i.unsqueeze(-2).unsqueeze(-1))
    b = input2.map((*batch, 1, 1, input2.shape[-1]), lambda i: i.unsqueeze(-2).unsqueeze(-2))
    product = add((*batch, *weight.shape), a, b, weight)
    y = contract(ctx, contract(ctx, product, len(product.shape) - 1), len(product.shape) - 2)
    return add_bias(ctx, y, bias, -1)


@rule("conv1d", "conv2d", "conv3d", weights=("weight", "bias"))
def conv(
    ctx: Context, input: Label, weight: Label, bias: Label | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Label:  # fmt: skip
    """y[n, o, ...] = sum over i and the kernel of x[n, i, ...] weight[o, i, ...] + bias[o].

    Shapes:   x (N, C, *), weight (O, C / groups, *kernel), bias (O,), y (N, O, *).
    Symmetry: weight[o, i] takes r[o] - x[the group of o, i]; bias[o] and y[n, o] take r[o].
    """
    space = len(weight.shape) - 2
    x = _batched(ctx, input, space)
    per_group = weight.shape[0] // groups
    if ctx.is_new(weight):
        fresh = LabelTerm(1, ctx.system.fresh(weight.shape[0], 1, *(1,) * space))
        inner = []
        for term in moving(x, 1):
            ids = term.ids.reshape(groups, 1, -1)
            if groups > 1:
                ids = ids.expand(-1, per_group, -1)
            ids = ids.reshape(-1, ids.shape[-1], *(1,) * space)
            inner.append(LabelTerm(-term.coefficient, ids))
        weight = ctx.define(weight, [fresh, *inner])
    # Product space (N, group, output of the group, input of the group, *space).
    w = _flat_kernel(ctx, weight, 2).map(
        (groups, per_group, weight.shape[1]),
        lambda i: squeeze_constant(_split(i, 0, groups, per_group)),
    )
    xs = x.map(
        (x.shape[0], groups, 1, weight.shape[1], *x.shape[2:]),
        lambda i: _split(i, 1, groups, weight.shape[1]).unsqueeze(2),
    )
    w = w.map((*w.shape, *(1,) * space), lambda i: i.reshape(*i.shape, *(1,) * space))
    product = add((x.shape[0], groups, per_group, weight.shape[1], *x.shape[2:]), xs, w)
    return _convolved(ctx, contract(ctx, product, 3), input, bias)


@rule(
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", weights=("weight", "bias")
)  # fmt: skip
def conv_transpose(
    ctx: Context, input: Label, weight: Label, bias: Label | None = None, stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Label:  # fmt: skip
    """The transposed convolution: each input channel spreads over the group's outputs.

    Shapes:   x (N, C, *), weight (C, O / groups, *kernel), bias (O,), y (N, O, *).
    Symmetry: weight[i, o] takes r[the group of i, o] - x[i]; bias[o] and y[n, o] take r[o].
    """
    space = len(weight.shape) - 2
    x = _batched(ctx, input, space)
    per_group, outputs = weight.shape[0] // groups, weight.shape[1]
    if ctx.is_new(weight):
        fresh = ctx.system.fresh(groups, 1, outputs)
        if groups > 1:
            fresh = fresh.expand(-1, per_group, -1)
        fresh = fresh.reshape(-1, outputs, *(1,) * space)
        inner = [
            LabelTerm(-t.coefficient, t.ids.reshape(-1, 1, *(1,) * space)) for t in moving(x, 1)
        ]
        weight = ctx.define(weight, [LabelTerm(1, fresh), *inner])
    # Product space (N, group, input of the group, output of the group, *space).
    w = _flat_kernel(ctx, weight, 2).map(
        (groups, per_group, outputs),
        lambda i: squeeze_constant(_split(i, 0, groups, per_group)),
    )
    xs = x.map(
        (x.shape[0], groups, per_group, 1, *x.shape[2:]),
        lambda i: _split(i, 1, groups, per_group).unsqueeze(3),
    )
    w = w.map((*w.shape, *(1,) * space), lambda i: i.reshape(*i.shape, *(1,) * space))
    product = add((x.shape[0], groups, per_group, outputs, *x.shape[2:]), xs, w)
    return _convolved(ctx, contract(ctx, product, 2), input, bias)


def _batched(ctx: Context, x: Label, space: int) -> Label:
    """The input of a convolution with a batch axis, alike at all positions that a kernel mixes."""
    if len(x.shape) == space + 1:
        x = x.map((1, *x.shape), lambda ids: ids.unsqueeze(0))
    return ctx.system.uniform(x, range(2, len(x.shape)))


def _flat_kernel(ctx: Context, weight: Label, axes: int) -> Label:
    """A weight's label without its kernel axes, along which it must not vary."""
    label = ctx.system.uniform(weight, range(axes, len(weight.shape)))
    return label.map(weight.shape[:axes], lambda ids: ids.reshape(ids.shape[:axes]))


def _split(ids: Tensor, axis: int, groups: int, size: int) -> Tensor:
    """Split an axis of channels into (group, channel of the group)."""
    sizes = (groups, size) if ids.shape[axis] > 1 else (1, 1)
    return ids.reshape(*ids.shape[:axis], *sizes, *ids.shape[axis + 1 :])


def _convolved(ctx: Context, grouped: Label, input: Label, bias: Label | None) -> Label:
    """Merge (group, output of the group) into channels, and add the bias."""
    shape = ctx.shape if len(ctx.shape) == len(grouped.shape) - 1 else (1, *ctx.shape)
    groups, outputs = grouped.shape[1:3]

    def merge(ids: Tensor) -> Tensor:
        if max(ids.shape[1:3]) > 1:
            ids = ids.expand(-1, groups, outputs, *ids.shape[3:])
        return ids.reshape(ids.shape[0], -1, *ids.shape[3:])

    y = grouped.map(shape, merge)
    y = add_bias(ctx, y, bias, 1)
    if len(ctx.shape) < len(shape):
        y = y.map(ctx.shape, lambda ids: ids.squeeze(0))
    return y


@rule("embedding", weights=("weight",))
def embedding(
    ctx: Context, input: Label, weight: Label, padding_idx: Any = None, max_norm: Any = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Any:  # fmt: skip
    """y[..., d] = weight[x[...], d].

    Shapes:   x (*) of integers, weight (V, D), y (*, D).
    Symmetry: which row is read is not known, so the weight takes e[d], and so does y[..., d].
    """
    if max_norm is not None:
        return NotImplemented  # renormalizes the rows that it reads, in place
    if ctx.is_new(weight):
        weight = ctx.define(weight, [LabelTerm(1, ctx.system.fresh(1, weight.shape[1]))])
    rows = ctx.system.uniform(weight, [0])
    return rows.map(ctx.shape, lambda ids: expand_dims(ids[0], len(ctx.shape)))


# What follows (input, weight, offsets) in a call; torch's own function has another order and takes
# (weight, input, offsets).
_BAG = (
    "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights",
    "include_last_offset", "padding_idx",
)  # fmt: skip
_TORCH_BAG = _BAG[2:]


@rule("embedding_bag", weights=("input", "weight"))
def embedding_bag(
    ctx: Context, input: Label, weight: Label, offsets: Any = None, *options: Any, **named: Any
) -> Any:
    """y[b, d] = the sum, mean or maximum over i in bag b of weight[x[i], d] * s[i].

    Shapes:   x (B, L) or (N,) of integers, weight (V, D), s like x, y (B, D).
    Symmetry: which rows are read is not known, so the weight takes e[d]; y[b, d] takes e[d] and
              what the numbers s of bag b scale by.
    """
    is_torchs = isinstance(ctx.out, tuple)  # with the bags' sizes and offsets
    given = {**dict(zip(_TORCH_BAG if is_torchs else _BAG, options, strict=False)), **named}
    if is_torchs:
        input, weight = weight, input
    if given.get("max_norm") is not None or len(weight.shape) != 2 or input.terms:
        return NotImplemented  # renormalizes rows in place, or the order before torch 1.0
    if ctx.parameter_name(input) is not None:
        return NotImplemented
    if ctx.is_new(weight):
        weight = ctx.define(weight, [LabelTerm(1, ctx.system.fresh(1, weight.shape[1]))])
    y = ctx.system.uniform(weight, [0])
    scales = given.get("per_sample_weights")
    if isinstance(scales, Label):
        # Without offsets each row is a bag; with them any run of entries may be one.
        scales = ctx.system.uniform(scales, [len(scales.shape) - 1])
        y = add(ctx.shape, y, scales.map((ctx.shape[0], 1), lambda ids: ids.reshape(-1, 1)))
    y = Label(ctx.shape, y.terms)
    return (y, *(Label(spec.shape) for spec in ctx.out[1:])) if is_torchs else y
