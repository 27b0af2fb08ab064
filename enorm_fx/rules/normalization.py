"""Normalization layers: the input is pinned, the affine parameters produce a new scale.

Scaling the input would change the result through epsilon, so the input keeps its values; what
gamma and beta make of the normalized tensor may be rescaled exactly, in training too. Weight
normalization has no epsilon: the direction that is divided by its norm may scale as it likes.
"""

from __future__ import annotations

from typing import Any

from enorm_fx.rules.reduction import reduced
from enorm_fx.rules.registry import Context, rule
from enorm_fx.symmetry.labels import Label, LabelTerm, add, expand_dims


@rule("batch_norm", weights=("weight", "bias"))
def batch_norm(
    ctx: Context, input: Label, running_mean: Any = None, running_var: Any = None,
    weight: Label | None = None, bias: Label | None = None, *args: Any, **kwargs: Any,
) -> Label:  # fmt: skip
    """y[n, c] = gamma[c] * (x - mean) / std + beta[c].

    "affine": x is pinned; gamma[c], beta[c] and y[n, c] take r[c].
    "skip":   the label passes as if the layer were not there; its own parameters stay, so the
              function is not kept and the plan says so.
    """
    _keep_statistics(ctx, running_mean, running_var)
    if ctx.batchnorm == "skip":
        ctx.ignore(input)
        for value in (weight, bias):
            if isinstance(value, Label):
                ctx.keep(value, "it belongs to a BatchNorm that is looked through")
        return Label(ctx.shape, input.terms)
    return _affine(ctx, input, weight, bias, _channels(len(input.shape)))


@rule("instance_norm", weights=("weight", "bias"))
def instance_norm(
    ctx: Context, input: Label, running_mean: Any = None, running_var: Any = None,
    weight: Label | None = None, bias: Label | None = None, *args: Any, **kwargs: Any,
) -> Label:  # fmt: skip
    """Statistics per sample and channel; gamma[c], beta[c] and y[n, c] take r[c]."""
    _keep_statistics(ctx, running_mean, running_var)
    return _affine(ctx, input, weight, bias, _channels(len(input.shape)))


@rule("group_norm", weights=("weight", "bias"))
def group_norm(
    ctx: Context, input: Label, num_groups: int, weight: Label | None = None,
    bias: Label | None = None, *args: Any, **kwargs: Any,
) -> Label:  # fmt: skip
    """Statistics per sample and group of channels; gamma[c], beta[c] and y[n, c] take r[c]."""
    return _affine(ctx, input, weight, bias, _channels(len(input.shape)))


@rule("layer_norm", weights=("weight", "bias"))
def layer_norm(
    ctx: Context, input: Label, normalized_shape: Any, weight: Label | None = None,
    bias: Label | None = None, *args: Any, **kwargs: Any,
) -> Label:  # fmt: skip
    """Statistics over the last axes; gamma, beta and y take a scale for every entry of gamma."""
    return _affine(ctx, input, weight, bias, _last)


@rule("rms_norm", weights=("weight",))
def rms_norm(
    ctx: Context, input: Label, normalized_shape: Any, weight: Label | None = None, eps: Any = None
) -> Label:
    """x over its root mean square, times gamma: gamma and y take a scale for every entry."""
    return _affine(ctx, input, weight, None, _last)


@rule("normalize", "cosine_similarity", "local_response_norm")
def normalize(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Label:
    """Divided by a norm with epsilon, without parameters: input and result keep their values."""
    reason = "it is normalized"
    for value in (input, *args, *kwargs.values()):
        if isinstance(value, Label):
            ctx.pin(ctx.known(value), reason)
    return ctx.pinned(ctx.shape, reason)


@rule("weight_norm", weights=("v", "g"))
def weight_norm(ctx: Context, v: Label, g: Label, dim: int = 0) -> Any:
    """w = g v / |v|, the norm over all axes but one; over all of them for dim = -1.

    Shapes:   v and w alike; g has v's size along dim and 1 elsewhere, or is one number.
    Symmetry: the norm asks that v scales alike along its axes, and then the scale of v cancels:
              it is free, a fresh variable per slice. w takes the label of g.
    Source:   Salimans, Kingma, "Weight Normalization", 2016, equation 2.
    """
    axes = _except(dim, len(v.shape))
    if axes is None or g.shape not in ((), tuple(1 if a in axes else n for a, n in _sizes(v))):
        return NotImplemented
    if ctx.is_new(v):
        sizes = [1 if a in axes else n for a, n in _sizes(v)]
        v = ctx.define(v, [LabelTerm(1, ctx.system.fresh(*sizes))])
    if ctx.is_new(g):
        g = ctx.define(g, [LabelTerm(1, ctx.system.fresh(*g.shape))])
    ctx.because("it is divided by its norm")
    ctx.system.uniform(v, axes)
    return add(ctx.shape, g)


@rule("norm_except_dim")
def norm_except_dim(ctx: Context, v: Label, pow: Any = 2, dim: int = 0) -> Any:
    """The norm over all axes but one, which stay with size 1; over all of them for dim = -1."""
    axes = _except(dim, len(v.shape))
    return NotImplemented if axes is None or pow == 0 else reduced(ctx, v, axes)


def _except(dim: int, ndim: int) -> list[int] | None:
    """The axes that a weight's norm is taken over; None where torch takes another view of dim."""
    return [a for a in range(ndim) if a != dim] if -1 <= dim < ndim else None


def _sizes(x: Label) -> list[tuple[int, int]]:
    return list(enumerate(x.shape))


def _keep_statistics(ctx: Context, *statistics: Any) -> None:
    """Running statistics are compared with the input: what they are made of keeps its values."""
    for value in statistics:
        if isinstance(value, Label):
            ctx.pin(ctx.known(value), "it is a running statistic")


def _channels(ndim: int) -> Any:
    """gamma's axis becomes the second of ndim axes."""
    return lambda ids, _: ids.reshape(1, -1, *(1,) * (ndim - 2))


def _last(ids: Any, ndim: int) -> Any:
    return expand_dims(ids, ndim)


def _affine(
    ctx: Context, input: Label, weight: Label | None, bias: Label | None, place: Any
) -> Label:
    op = ctx.node.op if ctx.node is not None else "normalization"
    reason = f"'{op}' normalizes its input"
    ctx.pin(input, reason)
    if weight is None:
        if bias is not None:
            ctx.pin(ctx.known(bias), reason)
        return ctx.pinned(ctx.shape, reason)
    if ctx.is_new(weight):
        weight = ctx.define(weight, [LabelTerm(1, ctx.system.fresh(*weight.shape))])
    if bias is not None:
        if ctx.parameter_name(bias) is not None and ctx.biases == "skip":
            ctx.ignore(weight)
        elif ctx.is_new(bias):
            ctx.define(bias, weight.terms)
        else:
            ctx.system.equal(weight, bias)
    ndim = len(input.shape)
    return weight.map(ctx.shape, lambda ids: place(ids, ndim))
