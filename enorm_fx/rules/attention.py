"""Attention: queries and keys may trade scale, values and the output projection too.

The scores go into a softmax, so per head and dimension the scale of a query is the inverse of
the key's. The attention weights are numbers, so what comes out has the values' scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from enorm_fx.rules.linear import add_bias, contract, linear, moving
from enorm_fx.rules.registry import Context, rule
from enorm_fx.symmetry.labels import Label, LabelTerm, add, expand_dims


@rule("scaled_dot_product_attention")
def attend(
    ctx: Context, query: Label, key: Label, value: Label, attn_mask: Label | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Label:  # fmt: skip
    """softmax(q k^T) v over the last two axes.

    Shapes:   q (*, L, D), k (*, S, D), v (*, S, V), y (*, L, V).
    Symmetry: q[d] and k[d] cancel; y takes what v has, which must not vary along S.
    """
    reason = "attention scores go into a softmax"
    if attn_mask is not None:
        ctx.pin(attn_mask, reason)
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = _repeat_heads(key, repeats), _repeat_heads(value, repeats)
    left = query.map((*query.shape[:-1], 1, query.shape[-1]), lambda ids: ids.unsqueeze(-2))
    right = key.map((*key.shape[:-2], 1, *key.shape[-2:]), lambda ids: ids.unsqueeze(-3))
    shape = torch.broadcast_shapes(left.shape, right.shape)
    ctx.pin(contract(ctx, add(shape, left, right), len(shape) - 1), reason)
    ctx.because("attention mixes positions")
    mixed = ctx.system.uniform(value, [len(value.shape) - 2])
    return mixed.map(ctx.shape, lambda ids: expand_dims(ids, len(ctx.shape)))


def _repeat_heads(x: Label, repeats: int) -> Label:
    shape = (*x.shape[:-3], x.shape[-3] * repeats, *x.shape[-2:])
    return x.map(shape, lambda i: i.repeat_interleave(repeats, dim=-3) if i.shape[-3] > 1 else i)


_PROJECTIONS = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight",
                "v_proj_weight", "out_proj_weight", "out_proj_bias")  # fmt: skip


@rule("multi_head_attention_forward", weights=_PROJECTIONS)
def multi_head_attention(
    ctx: Context, query: Label, key: Label, value: Label, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Label | None, in_proj_bias: Label | None, bias_k: Label | None,
    bias_v: Label | None, add_zero_attn: bool, dropout_p: float, out_proj_weight: Label,
    out_proj_bias: Label | None, training: bool = True, key_padding_mask: Label | None = None,
    need_weights: bool = True, attn_mask: Label | None = None,
    use_separate_proj_weight: bool = False, q_proj_weight: Label | None = None,
    k_proj_weight: Label | None = None, v_proj_weight: Label | None = None,
    static_k: Any = None, static_v: Any = None, average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:  # fmt: skip
    """nn.MultiheadAttention: three projections, attention per head, the output projection.

    Shapes:   query (L, N, E) or (L, E), in_proj_weight (3 E, E), out_proj_weight (E, E).
    Symmetry: the rows for queries and keys take opposite scales per head dimension; those for
              values produce what the output projection takes back.
    """
    if static_k is not None or static_v is not None:
        return NotImplemented
    inputs = [query, key, value]
    size = embed_dim_to_check
    if use_separate_proj_weight:
        weights = [q_proj_weight, k_proj_weight, v_proj_weight]
    else:
        packed = _packed(ctx, in_proj_weight, inputs)
        weights = [_rows(packed, i * size, size) for i in range(3)]
    biases = [None] * 3 if in_proj_bias is None else _packed_bias(ctx, in_proj_bias, size)
    q, k, v = (
        add_bias(ctx, linear(ctx, x, w, None), b, -1)
        for x, w, b in zip(inputs, weights, biases, strict=True)
    )
    for extra, x in ((bias_k, k), (bias_v, v)):
        if extra is not None:
            ctx.system.equal(x, extra.map((size,), lambda ids: ids.reshape(-1)))
    heads = [_heads(ctx, x, num_heads) for x in (q, k, v)]
    reason = "attention scores go into a softmax"
    for mask in (key_padding_mask, attn_mask):
        if mask is not None:
            ctx.pin(mask, reason)
    scores = contract(ctx, add(heads[0].shape, heads[0], heads[1]), 1)
    ctx.pin(scores, reason)
    mixed = heads[2].map(
        (*query.shape[:-1], size),
        lambda ids: expand_dims(_merge_heads(ids, heads[2].shape), len(query.shape)),
    )
    result = linear(ctx, mixed, out_proj_weight, out_proj_bias)
    rest = tuple(None if spec is None else Label(spec.shape) for spec in ctx.out[1:])
    return (result, *rest)


def _packed(ctx: Context, weight: Label | None, inputs: list[Label]) -> Label:
    """The stacked projection: a fresh scale per row, each third reads its own input."""
    if weight is None or not ctx.is_new(weight):
        return weight  # type: ignore[return-value]
    rows, columns = weight.shape
    terms = [LabelTerm(1, ctx.system.fresh(rows, 1))]
    third = rows // 3
    parts = [moving(x, -1) for x in inputs]
    for k in range(max(map(len, parts))):
        for coefficient in {p[k].coefficient for p in parts if k < len(p)}:
            blocks = [
                p[k].ids.reshape(1, -1).expand(third, -1)
                if k < len(p) and p[k].coefficient == coefficient
                else ctx.system.nil.reshape(1, 1).expand(third, columns)
                for p in parts
            ]
            same = all(torch.equal(blocks[0], b) for b in blocks[1:])
            ids = blocks[0][:1] if same else torch.cat(blocks)
            terms.append(LabelTerm(-coefficient, ids))
    return ctx.define(weight, terms)


def _rows(label: Label, start: int, length: int) -> Label:
    """A range of rows, without the identity of the parameter that they belong to."""
    return label.map(
        (length, *label.shape[1:]),
        lambda ids: ids.narrow(0, start, length) if ids.shape[0] > 1 else ids,
    )


def _packed_bias(ctx: Context, bias: Label, size: int) -> list[Label]:
    known = ctx.known(bias)
    return [_rows(known, i * size, size) for i in range(3)]


def _heads(ctx: Context, x: Label, heads: int) -> Label:
    """(*, E) as (heads, E / heads), the same at all positions."""
    label = ctx.system.uniform(x, range(len(x.shape) - 1))

    def split(ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        return flat.reshape(heads, -1) if flat.numel() > 1 else flat.reshape(1, 1)

    return label.map((heads, x.shape[-1] // heads), split)


def _merge_heads(ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    return ids.expand(shape).reshape(-1) if ids.numel() > 1 else ids.reshape(-1)
