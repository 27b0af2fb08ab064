"""Ops that work entry by entry on one tensor."""

from __future__ import annotations

from typing import Any

import torch

from enorm_fx.nested import instances
from enorm_fx.rules.registry import Context, Flow, rule
from enorm_fx.symmetry.labels import Label, LabelTerm


@rule(
    "relu", "leaky_relu", "rrelu", "abs", "neg", "positive",
    "dropout", "dropout1d", "dropout2d", "dropout3d",
    "clone", "contiguous", "detach", "alias", "lift_fresh", "data", "real",
    "cpu", "cuda", flow=Flow.PASSES,
)  # fmt: skip
def homogeneous(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Label:
    """f(d x) = d f(x) for d > 0: the label passes.

    Slopes, probabilities and memory formats do not matter; they stay as they are.
    """
    return Label(ctx.shape, input.terms, input.wild)


@rule(
    "to",
    "type",
    "type_as",
    "float",
    "double",
    "half",
    "bfloat16",
    "long",
    "int",
    "short",
    "bool",
    "char",
    "byte",
    "to_copy",
    flow=Flow.PASSES,
)
def cast(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Any:
    """A change of floating-point type or device keeps the label; one to integers is rounding."""
    return Label(ctx.shape, input.terms, input.wild)


@rule("prelu")
def prelu(ctx: Context, input: Label, weight: Label) -> Label:
    """y = x where x > 0, weight[c] x elsewhere: homogeneous in x whatever the slope's sign.

    The slope is no factor of the whole output, so it keeps its value.
    """
    ctx.pin(weight, "the slope of a prelu scales only the negative part")
    return Label(ctx.shape, input.terms)


@rule("clamp", "clamp_min", "clamp_max", "hardtanh", "relu6", flow=Flow.ENTRIES)
def clamp(
    ctx: Context, input: Label, min: Any = None, max: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Homogeneous where every bound that is given is zero; relu6 and hardtanh are not."""
    min = kwargs.get("min_val", min)
    max = kwargs.get("max_val", max)
    bounds = [b for b in (min, max) if b is not None]
    if ctx.node is not None and ctx.node.op == "hardtanh" and (min, max) == (0, 6):
        return _keep(ctx, [input], "relu6")  # nn.ReLU6 calls it by this name
    if ctx.node is None or ctx.node.op in ("hardtanh", "relu6"):
        return bounded(ctx, input)
    if any(isinstance(b, Label) or b != 0 for b in bounds):
        return bounded(ctx, input, *bounds)
    return Label(ctx.shape, input.terms, input.wild)


@rule("threshold", flow=Flow.ENTRIES)
def threshold(
    ctx: Context, input: Label, threshold: float, value: float, inplace: bool = False
) -> Label:
    """y = x where x > threshold, value elsewhere: homogeneous where both are zero."""
    passes = threshold == 0 and value == 0
    label: Label = homogeneous(ctx, input) if passes else bounded(ctx, input)
    return label


@rule(
    "sigmoid", "tanh", "gelu", "silu", "mish", "elu", "selu", "celu", "softplus", "softsign",
    "hardsigmoid", "hardswish", "hardshrink", "softshrink", "tanhshrink", "logsigmoid",
    "log_sigmoid", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "logaddexp", "sin",
    "cos", "tan", "erf", "erfc", "floor", "ceil", "round", "trunc", "frac", "alpha_dropout",
    "feature_alpha_dropout", "cosh", "sinh", "asin", "acos", "atan", "acosh", "asinh", "atanh",
    "logit", "sinc", "lgamma",
    flow=Flow.ENTRIES,
)  # fmt: skip
@rule("softmax", "log_softmax", "softmin", "gumbel_softmax", "logsumexp")
def bounded(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Label:
    """No f(d x) = d f(x): the input keeps its values, and so does the output."""
    op = ctx.node.op if ctx.node is not None else "this op"
    return _keep(ctx, [input, *args, *kwargs.values()], op)


def _keep(ctx: Context, values: list[Any], op: str) -> Label:
    reason = f"'{op}' does not scale with its input"
    for value in values:
        if isinstance(value, Label):
            ctx.pin(value, reason)
    return ctx.pinned(ctx.shape, reason)


@rule("glu")
def glu(ctx: Context, input: Label, dim: int = -1) -> Label:
    """y = a * sigmoid(b) with x = cat(a, b): b is pinned, a passes."""
    size = ctx.shape[dim]
    half = input.map(ctx.shape, lambda ids: _narrow(ids, dim, 0, size))
    gate = input.map(ctx.shape, lambda ids: _narrow(ids, dim, size, size))
    ctx.pin(gate, "'glu' takes the sigmoid of its second half")
    return half


def _narrow(ids: torch.Tensor, dim: int, start: int, length: int) -> torch.Tensor:
    return ids.narrow(dim, start, length) if ids.shape[dim] > 1 else ids


@rule("square", flow=Flow.PASSES)
def square(ctx: Context, input: Label) -> Label:
    """Homogeneous of degree 2."""
    return input.times(2)


@rule("reciprocal", flow=Flow.ENTRIES)
def reciprocal(ctx: Context, input: Label) -> Label:
    """Homogeneous of degree -1."""
    return -input


@rule("sqrt", "rsqrt", flow=Flow.ENTRIES)
def sqrt(ctx: Context, input: Label) -> Label:
    """Homogeneous of degree 1/2 or -1/2: twice the result's label is plus or minus the input's."""
    degree = -1 if ctx.node is not None and ctx.node.op == "rsqrt" else 1
    return _root(ctx, input.times(degree), 2)


@rule("pow", flow=Flow.ENTRIES)
def power(ctx: Context, input: Any, exponent: Any) -> Any:
    """x**k is homogeneous of degree k for an integer k; k = 1/2 and -1/2 are square roots."""
    if isinstance(exponent, Label):
        value = ctx.value(exponent)
        exponent = value.item() if value is not None and value.numel() == 1 else exponent
    if not isinstance(input, Label) or isinstance(exponent, Label):
        return NotImplemented
    if float(exponent).is_integer():
        return input.times(int(exponent)) if exponent else Label(input.shape)
    if float(2 * exponent).is_integer():
        return _root(ctx, input.times(int(2 * exponent)), 2)
    return NotImplemented


def _root(ctx: Context, label: Label, degree: int) -> Label:
    """The label whose multiple by `degree` is the given one."""
    if not label.terms:
        return Label(label.shape)
    shape = torch.broadcast_shapes(*(t.ids.shape for t in label.terms))
    root = LabelTerm(1, ctx.system.fresh(*shape))
    ctx.system.zero([LabelTerm(degree, root.ids), *(-label).terms])
    return Label(label.shape, (root,))


@rule("sign", "isnan", "isinf", "isfinite", flow=Flow.ENTRIES)
def scale_free(ctx: Context, input: Label) -> Label:
    """The result does not change when the input is scaled: nothing is required of it."""
    return Label(ctx.shape)


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
      "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")  # fmt: skip
def like(ctx: Context, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Only the shape of the input is read."""
    return constant(ctx, *args, **kwargs)


@rule("zeros", "ones", "full", "arange", "linspace", "eye", "tensor", "as_tensor", "scalar_tensor",
      "rand", "randn", "randint", "randperm", "tril_indices", "triu_indices")  # fmt: skip
def constant(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """A tensor made from numbers: it keeps its values."""
    if any(ctx.known(label).terms for label in instances(Label, (args, kwargs))):
        return NotImplemented
    return Label(ctx.shape)
