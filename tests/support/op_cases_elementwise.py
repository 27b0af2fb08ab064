"""Ops on one tensor, entry by entry."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.op_cases import IN_PLACE, OpCase, pos, spell, x

aten = torch.ops.aten


def _in_place(f: object) -> object:
    """Both what an in-place op returns and what the tensor has become."""

    def run(a: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        b = a.clone()
        return f(b, *rest), b  # type: ignore[operator]

    return run


def _new_tensor(a: Tensor, b: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return a.new_tensor(b)


def _times_ten(module: nn.Module) -> nn.Module:
    """Large enough to reach the upper bound."""
    return nn.Sequential(_Scale(10.0), module)


class _Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, a: Tensor) -> Tensor:
        return a * self.factor


def homogeneous() -> Iterator[OpCase]:
    a = x(2, 3)
    yield from spell("relu", inputs=(a,))
    yield OpCase("nn.ReLU", nn.ReLU(), (a,))
    yield OpCase("nn.ReLU(inplace)", nn.ReLU(inplace=True), (a,))
    yield OpCase("aten.relu", aten.relu.default, (a,))
    yield OpCase("relu_ seen twice", _in_place(torch.relu_), (a,))
    yield from spell("leaky_relu", 0.2, inputs=(a,))
    yield from spell("leaky_relu", -0.5, inputs=(a,))
    yield OpCase("nn.LeakyReLU", nn.LeakyReLU(0.3), (a,))
    yield from spell("rrelu", 0.1, 0.4, inputs=(a,))
    yield OpCase("nn.RReLU train", nn.RReLU(0.1, 0.9), (a,))
    yield OpCase("F.rrelu train", lambda a: F.rrelu(a, 0.1, 0.9, training=True), (a,))
    for name in ("abs", "neg", "positive", "absolute", "negative"):
        yield from spell(name, inputs=(a,))
    yield OpCase("abs operator", lambda a: abs(a), (a,))
    yield OpCase("neg operator", lambda a: -a, (a,))
    yield OpCase("pos operator", lambda a: +a, (a,))
    yield OpCase("nn.Dropout train", nn.Dropout(0.4), (a,))
    yield OpCase("nn.Dropout eval", nn.Dropout(0.4).eval(), (a,))
    yield from spell("dropout", 0.5, True, inputs=(a,))
    image = x(2, 3, 2, 2)
    yield OpCase("nn.Dropout1d", nn.Dropout1d(0.5), (x(2, 3, 2),))
    yield OpCase("nn.Dropout2d", nn.Dropout2d(0.5), (image,))
    yield OpCase("nn.Dropout3d", nn.Dropout3d(0.5), (x(2, 2, 2, 1, 2),))
    yield OpCase("F.dropout1d", lambda a: F.dropout1d(a, 0.5), (x(2, 3, 2),))
    yield OpCase("F.dropout2d", lambda a: F.dropout2d(a, 0.5), (image,))
    yield OpCase("F.dropout3d", lambda a: F.dropout3d(a, 0.5), (x(2, 2, 1, 2, 1),))
    yield OpCase("torch.feature_dropout", lambda a: torch.feature_dropout(a, 0.5, True), (image,))
    for name in ("clone", "detach", "contiguous"):
        yield from spell(name, inputs=(a,))
    yield OpCase("x.data", lambda a: a.data, (a,))
    yield OpCase("x.real", lambda a: a.real, (a,))
    yield OpCase("x.cpu", lambda a: a.cpu(), (a,))
    yield OpCase("aten.alias", aten.alias.default, (a,))
    yield OpCase("aten.lift_fresh", aten.lift_fresh.default, (a,))
    yield OpCase(
        "clone of channels last",
        lambda a: a.contiguous(memory_format=torch.channels_last),
        (image,),
    )
    yield OpCase("x.to(dtype)", lambda a: a.to(torch.float64), (a,))
    yield OpCase("x.to(integer)", lambda a: a.to(torch.int64), (a,), "rounding has no derivative")
    yield OpCase("x.long", lambda a: a.long(), (a,), "rounding has no derivative")
    yield OpCase("x.type", lambda a: a.type(torch.float64), (a,))
    yield OpCase("x.type_as", lambda a, b: a.type_as(b), (a, x(1)))
    yield OpCase("x.double", lambda a: a.double(), (a,))
    yield OpCase("aten._to_copy", lambda a: aten._to_copy.default(a), (a,))
    yield OpCase("requires_grad_", lambda a: a.requires_grad_(False) * 2, (a,))
    yield OpCase("nn.Identity", nn.Identity(), (a,))


def activations_with_numbers() -> Iterator[OpCase]:
    a = x(2, 3)
    for slopes in (1, 3):
        module = nn.PReLU(slopes)
        with torch.no_grad():
            module.weight.copy_(torch.linspace(-0.7, 0.4, slopes))
        for shape in ((2, 3), (2, 3, 2), (2, 3, 2, 2)):
            yield OpCase(f"nn.PReLU({slopes}) on {shape}", module, (x(*shape),))
    yield OpCase("F.prelu", F.prelu, (a, x(3)))
    yield OpCase("torch.prelu", torch.prelu, (a, x(1)))
    yield OpCase("x.prelu", Tensor.prelu, (a, x(3)))
    yield from spell("clamp", 0, inputs=(a,))
    yield from spell("clamp", 0.1, inputs=(a,))
    yield from spell("clamp", 0, 1, inputs=(a,))
    yield from spell("clip", min=0, inputs=(a,))
    yield OpCase("clamp(max=0)", lambda a: a.clamp(max=0), (a,))
    yield OpCase("clamp(min=0, max=0.5)", lambda a: torch.clamp(a, min=0, max=0.5), (a,))
    yield OpCase("clamp(None, 0)", lambda a: a.clamp(None, 0), (a,))
    yield OpCase(
        "clamp by tensors", lambda a, b: torch.clamp(a, min=b), (a, x(3)), "bounds that are tensors"
    )
    yield from spell("clamp_min", 0, inputs=(a,))
    yield from spell("clamp_max", 0, inputs=(a,))
    yield from spell("clamp_min", -0.1, inputs=(a,))
    yield from spell("hardtanh", inputs=(a,))
    yield OpCase("nn.Hardtanh(0, 1)", nn.Hardtanh(0.0, 1.0), (a,))
    yield OpCase("F.hardtanh by names", lambda a: F.hardtanh(a, min_val=0.0, max_val=0.5), (a,))
    for case in spell("relu6", inputs=(a,)):
        yield OpCase(case.name, lambda a, f=case.run: f(10 * a), (a,))
    yield OpCase("nn.ReLU6", _times_ten(nn.ReLU6()), (a,))
    yield from spell("threshold", 0, 0, inputs=(a,))
    yield from spell("threshold", 0.1, 0, inputs=(a,), slack="the boundary moves")
    yield from spell("threshold", 0, 0.3, inputs=(a,))
    yield OpCase("nn.Threshold(0, 0)", nn.Threshold(0, 0), (a,))
    for dim in (0, 1, -1, -2):
        yield OpCase(f"F.glu dim {dim}", lambda a, dim=dim: F.glu(a, dim), (x(2, 4),))
    yield OpCase("nn.GLU", nn.GLU(1), (x(2, 4, 2),))
    yield OpCase("nn.GLU channel labels", lambda a, s: F.glu(a * s, 1), (x(1, 4), x(1, 4)))


def bounded() -> Iterator[OpCase]:
    a, p = x(2, 3), pos(2, 3)
    for name in (
        "sigmoid", "tanh", "gelu", "silu", "mish", "elu", "selu", "celu", "softplus", "softsign",
        "hardsigmoid", "hardswish", "tanhshrink", "logsigmoid", "log_sigmoid", "exp", "exp2",
        "expm1", "sin", "cos", "tan", "erf", "erfc", "cosh", "softshrink", "sinh",
        "atan", "asinh", "sinc",
    ):  # fmt: skip
        yield from spell(name, inputs=(a,))
    for name in ("log", "log2", "log10", "log1p", "lgamma"):
        yield from spell(name, inputs=(p,))
    for name in ("hardshrink", "floor", "ceil", "round", "trunc", "frac"):
        yield from spell(name, inputs=(5 * a,), slack="constant almost everywhere or nearly so")
    for name in ("asin", "acos", "atanh"):
        for case in spell(name, inputs=(a,)):
            yield OpCase(case.name, lambda a, f=case.run: f(a / 10), (a,))
    for case in spell("acosh", inputs=(p,)):
        yield OpCase(case.name, lambda a, f=case.run: f(a * 10), (p,))
    for case in spell("logit", inputs=(p,)):
        yield OpCase(case.name, lambda a, f=case.run: f(a / 10), (p,))
    for name in ("softmax", "log_softmax"):
        for dim in (0, -1):
            yield from spell(name, dim, inputs=(a,))
    yield from spell("softmin", 1, inputs=(a,))
    yield from spell("logsumexp", 1, inputs=(a,))
    yield from spell("logaddexp", inputs=(a, x(3)))
    yield OpCase("F.gumbel_softmax", lambda a: F.gumbel_softmax(a, 1.0), (a,))
    for module in (
        nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.ELU(0.7),
        nn.SELU(), nn.CELU(), nn.Softplus(), nn.Softsign(), nn.Hardsigmoid(), nn.Hardswish(),
        nn.Tanhshrink(), nn.LogSigmoid(), nn.Softmax(1), nn.LogSoftmax(1), nn.Softmin(1),
    ):  # fmt: skip
        yield OpCase(f"nn.{module}", module, (a,))
    yield OpCase("nn.Softmax2d", nn.Softmax2d(), (x(1, 3, 2, 2),))
    random = "the mask hides which entries are mixed"
    yield OpCase("nn.AlphaDropout", nn.AlphaDropout(0.3), (x(3, 4),), random)
    yield OpCase("nn.FeatureAlphaDropout", nn.FeatureAlphaDropout(0.3), (x(2, 3, 2, 2),), random)
    yield OpCase("F.alpha_dropout", lambda a: F.alpha_dropout(a, 0.3, True), (x(3, 4),), random)
    yield OpCase(
        "torch.feature_alpha_dropout",
        lambda a: torch.feature_alpha_dropout(a, 0.3, True), (x(2, 3, 2, 2),), random,
    )  # fmt: skip


def powers() -> Iterator[OpCase]:
    a, p = x(2, 3), pos(2, 3)
    yield from spell("square", inputs=(a,), in_place=IN_PLACE)
    yield from spell("reciprocal", inputs=(a,), in_place=IN_PLACE)
    yield from spell("sqrt", inputs=(p,), in_place=IN_PLACE)
    yield from spell("rsqrt", inputs=(p,), in_place=IN_PLACE)
    for exponent in (2, 3, 1, 0, -1, 0.5, -0.5, 1.5, 2.5, 0.3):
        yield from spell(
            "pow",
            exponent,
            inputs=(p,),
            in_place=IN_PLACE,
            slack="" if exponent != 0.3 else "roots other than square",
        )
    yield OpCase("power operator", lambda a: a**2, (a,))
    yield OpCase("power in place", _in_place(lambda b: b.__ipow__(2)), (p,), IN_PLACE)
    yield OpCase("power by a constant tensor", lambda a: a ** torch.tensor(2.0), (a,))
    yield OpCase("power by a tensor", torch.pow, (p, x(3)))
    yield OpCase("number to a power", lambda a: 2**a, (a,))
    yield OpCase("float_power", lambda a: torch.float_power(a, 3), (a,))
    yield OpCase("sqrt of a square", lambda a: (a * a).sqrt(), (a,))
    yield OpCase("sqrt of a sum of squares", lambda a: a.square().sum(1).sqrt(), (a,))
    for name in ("sign", "isnan", "isinf", "isfinite"):
        yield from spell(name, inputs=(a,), slack="constant almost everywhere")
    yield OpCase("x * sign(y)", lambda a, b: a * torch.sign(b), (a, x(2, 3)))


def made_from_numbers() -> Iterator[OpCase]:
    a = x(2, 3)
    for name in ("zeros", "ones", "rand", "randn"):
        function = getattr(torch, f"{name}_like")
        yield OpCase(f"x, {name}_like", lambda a, f=function: (f(a), a * 2), (a,))
    # Whatever lies in memory may be anything: of that, no entry is taken.
    yield OpCase("x, empty_like", lambda a: (torch.empty_like(a)[:0], a * 2), (a,))
    yield OpCase("x + ones_like", lambda a: a + torch.ones_like(a), (a,))
    yield OpCase("x + zeros_like", lambda a: a + torch.zeros_like(a), (a,))
    yield OpCase("max(x, zeros)", lambda a: torch.maximum(a, torch.zeros(2, 3).double()), (a,))
    yield OpCase("full_like", lambda a: (torch.full_like(a, 2.0), a), (a,))
    yield OpCase("x + new_zeros", lambda a: a + a.new_zeros(3), (a,))
    yield OpCase("x + new_ones", lambda a: a + a.new_ones(3), (a,))
    yield OpCase("x + new_full", lambda a: a + a.new_full((3,), 0.5), (a,))
    yield OpCase("x, new_empty", lambda a: (a.new_empty((0, 3)), a), (a,))
    yield OpCase("x + new_tensor", lambda a: a + a.new_tensor([1.0, 2.0, 3.0]), (a,))
    yield OpCase("new_tensor of a tensor", _new_tensor, (a, x(2)), "rarely met")
    for name, make in {
        "zeros": lambda: torch.zeros(3), "ones": lambda: torch.ones(3),
        "full": lambda: torch.full((3,), 0.7), "arange": lambda: torch.arange(1, 4),
        "linspace": lambda: torch.linspace(1, 2, 3), "eye": lambda: torch.eye(2, 3) + 1,
        "tensor": lambda: torch.tensor([1.0, 2.0, 3.0]),
        "as_tensor": lambda: torch.as_tensor([1.0, 2.0, 3.0]),
        "scalar_tensor": lambda: torch.scalar_tensor(2.0),
        "rand": lambda: torch.rand(3), "randn": lambda: torch.randn(3),
        "randint": lambda: torch.randint(1, 5, (3,)), "randperm": lambda: torch.randperm(3) + 1,
    }.items():  # fmt: skip
        yield OpCase(f"x * torch.{name}", lambda a, make=make: a * make(), (a,))
        slack = "numbers that are drawn may be zero" if name == "zeros" else ""
        yield OpCase(f"x + torch.{name}", lambda a, make=make: a + make(), (a,), slack)
    yield OpCase("as_tensor of a tensor", lambda a: torch.as_tensor(a), (a,), "rarely met")
    yield OpCase("as_tensor by name", lambda a: torch.as_tensor(data=a), (a,), "rarely met")
    for name in ("tril_indices", "triu_indices"):

        def run(a: Tensor, f: object = getattr(torch, name)) -> Tensor:
            i, j = f(3, 3)  # type: ignore[operator]
            return a[i, j]

        yield OpCase(f"x[torch.{name}]", run, (x(3, 3),))


CASES = [
    *homogeneous(), *activations_with_numbers(), *bounded(), *powers(), *made_from_numbers()
]  # fmt: skip
