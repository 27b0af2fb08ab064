"""Sums, products, concatenation, choice, comparison, reductions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.op_cases import IN_PLACE, OpCase, pos, spell, x

aten = torch.ops.aten
# Shapes that broadcast against each other in every way.
PAIRS = (
    ((2, 3), (2, 3)), ((2, 3), (3,)), ((3,), (2, 3)), ((2, 1), (1, 3)), ((2, 3), (2, 1)),
    ((2, 3), ()), ((2, 1, 2), (3, 1)), ((1,), (2, 2)),
)  # fmt: skip


def sums() -> Iterator[OpCase]:
    for a, b in PAIRS:
        yield OpCase(f"add {a} {b}", operator.add, (x(*a), x(*b)))
        yield OpCase(f"sub {a} {b}", torch.sub, (x(*a), x(*b)))
        yield OpCase(f"maximum {a} {b}", torch.maximum, (x(*a), x(*b)))
    two = (x(2, 3), x(2, 3))
    for name in ("add", "sub", "subtract", "rsub"):
        yield from spell(name, inputs=two)
        yield from spell(name, inputs=two, alpha=-2)
        yield from spell(name, 0, inputs=two[:1])
        yield from spell(name, 1.5, inputs=two[:1])
    yield OpCase("aten.add.Tensor", aten.add.Tensor, two)
    yield OpCase("number + x", lambda a: 1 + a, two[:1])
    yield OpCase("0 + x", lambda a: 0 + a, two[:1])
    yield OpCase("sum of a list", lambda a, b: sum([a, b, a]), two)
    yield OpCase("number - x", lambda a: 2 - a, two[:1])
    yield OpCase("0 - x", lambda a: 0 - a, two[:1])
    yield OpCase("x.__radd__", lambda a: a.__radd__(3), two[:1])
    yield OpCase("x += y", operator.iadd, two)
    yield OpCase("x -= y", operator.isub, two)
    yield OpCase("x + constant", lambda a: a + torch.tensor([1.0, 2.0, 0.5]), two[:1])
    yield OpCase("x + zero constant", lambda a: a + torch.zeros(3), two[:1])
    yield OpCase("x + partly zero constant", lambda a: a + torch.tensor([0.0, 1.0, 0.0]), two[:1],
                 "a constant is zero as a whole or not at all")  # fmt: skip
    for name in ("maximum", "minimum", "fmax", "fmin"):
        yield from spell(name, inputs=two)
    yield from spell("lerp", 0.3, inputs=two)
    yield OpCase("lerp by a tensor", torch.lerp, (*two, x(3)))
    for name in ("addcmul", "addcdiv"):
        yield from spell(name, inputs=(x(2, 3), x(3), x(2, 1)))
        yield from spell(name, inputs=(x(3), x(3), x(3)), value=-0.5)


def products() -> Iterator[OpCase]:
    for a, b in PAIRS:
        yield OpCase(f"mul {a} {b}", operator.mul, (x(*a), x(*b)))
        yield OpCase(f"div {a} {b}", operator.truediv, (x(*a), x(*b)))
    one = (x(2, 3),)
    two = (*one, x(2, 3))
    for name in ("mul", "multiply", "div", "divide", "true_divide"):
        yield from spell(name, inputs=two, in_place=IN_PLACE)
        yield from spell(name, 2.5, inputs=one)
        yield from spell(name, -1, inputs=one)
    yield OpCase("number * x", lambda a: 3 * a, one)
    yield OpCase("x.__rmul__", lambda a: a.__rmul__(3), one)
    yield OpCase("number / x", lambda a: 3 / a, one)
    yield OpCase("x *= number", lambda a: operator.imul(a, 3), one)
    yield OpCase("x *= y", operator.imul, two, IN_PLACE)
    yield OpCase("x * x", lambda a: a * a, one)
    yield OpCase("x * relu(x)", lambda a: a * a.relu(), one)
    yield OpCase("x / x", lambda a: a / a.abs(), one)
    yield OpCase("a + b * c", lambda a, b, c: a + b * c, (*two, x(3)))
    yield OpCase("gate", lambda a, b, c: a.relu() * b + c, (*two, x(2, 3)))
    rounding = "rounding has no derivative"
    yield OpCase("floor division", lambda a: a // 0.1, one, rounding)
    yield OpCase(
        "div(rounding_mode)", lambda a, b: torch.div(a, b, rounding_mode="floor"), two, rounding
    )
    yield OpCase("remainder", lambda a: a % 2, one, "rounding")


def side_by_side() -> Iterator[OpCase]:
    for dim in (0, 1, -1, -2):
        shapes = ((2, 3), (1, 3)) if dim % 2 == 0 else ((2, 3), (2, 1))
        a, b = (x(*s) for s in shapes)
        yield OpCase(f"cat dim {dim}", lambda a, b, d=dim: torch.cat([a, b], d), (a, b))
    a, b, c = x(2, 3), x(2, 3), x(2, 3)
    for name in ("cat", "concat", "concatenate"):
        function = getattr(torch, name)
        yield OpCase(f"{name} along rows", lambda a, b, f=function: f((a, b), dim=1), (a, b))
        yield OpCase(f"{name} of one twice", lambda a, f=function: f((a, a), -1), (a,))
    yield OpCase("cat(axis)", lambda a, b: torch.cat([a, b], axis=1), (a, b))
    yield OpCase("cat of an empty tensor", lambda a: torch.cat([torch.zeros(0), a], 1), (a,))
    yield OpCase("cat with zeros", lambda a: torch.cat([a, torch.zeros(2, 2)], 1), (a,))
    yield OpCase("cat with ones", lambda a: torch.cat([a, torch.ones(2, 2)], 1), (a,))
    yield OpCase("cat of powers", lambda a, b: torch.cat([a * b, a / b, a**2], 1), (a, b))
    yield OpCase("aten.cat", lambda a, b: aten.cat.default([a, b], 1), (a, b))
    for name in ("hstack", "vstack", "dstack", "column_stack", "row_stack"):
        for shape in ((2, 2, 2), (2, 3), (3,)):
            function = getattr(torch, name)
            few = "tensors that get another axis" if len(shape) < 3 else ""
            yield OpCase(f"{name} {shape}", lambda a, b, f=function: f([a, b]),
                         (x(*shape), x(*shape)), few)  # fmt: skip
    for dim in (0, 1, 2, -1, -3):
        yield OpCase(
            f"stack dim {dim}", lambda a, b, c, d=dim: torch.stack([a, b, c], d), (a, b, c)
        )
    yield OpCase("stack().mean", lambda a, b: torch.stack([a, b]).mean(0), (a, b))


def choices() -> Iterator[OpCase]:
    a, b = x(2, 3), x(2, 3)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    given = "the mask is an input, so it may be another one"
    yield OpCase("where", torch.where, (mask, a, b), given, 6)
    yield OpCase("where broadcast", torch.where, (mask, x(3), x(2, 1)), given, 1)
    yield OpCase("x.where", lambda m, a, b: a.where(m, b), (mask, a, b), given, 6)
    yield OpCase("where zero", lambda m, a: torch.where(m, a, 0.0), (mask, a))
    yield OpCase("where one", lambda m, a: torch.where(m, 1.0, a), (mask, a),
                 "an entry that is replaced pins the others")  # fmt: skip
    yield OpCase("where x > 0", lambda a, b: torch.where(a > 0, a, b), (a, b))
    yield OpCase(
        "where x > 0, labels apart", lambda a, b, c: torch.where(a > 0, b, c), (a, b, x(3))
    )
    yield OpCase("where x > y", lambda a, b: torch.where(a > b, a, -b), (a, b))
    yield OpCase("where x > 0.1", lambda a, b: torch.where(a > 0.1, a, b), (a, b),
                 "the boundary moves")  # fmt: skip
    for value in (0, float("-inf"), 0.5):
        why = "an entry that is replaced pins the others" if value == 0.5 else ""
        why = why or ("infinite" if value else "")
        yield from spell("masked_fill", mask, value, inputs=(a,), slack=why)
    yield OpCase("masked_fill broadcast", lambda a: a.masked_fill(mask, 0), (x(3),))
    yield OpCase("masked_fill broadcast input", lambda a: a.masked_fill(mask[0], 0), (a,))
    yield OpCase("masked_fill by a tensor", lambda a: a.masked_fill(mask, torch.tensor(2.0)), (a,),
                 "an entry that is replaced pins the others")  # fmt: skip
    whole = "no derivative"
    for name in ("eq", "ne", "lt", "le", "gt", "ge", "greater", "less_equal", "not_equal"):
        function = getattr(torch, name)
        yield OpCase(f"x {name} 0", lambda a, f=function: f(a, 0), (a,), whole)
        yield OpCase(f"x {name} 1", lambda a, f=function: f(a, 1), (a,), whole)
        yield OpCase(f"x {name} y", function, (a, b), whole)
        yield OpCase(f"(x {name} 0) * y", lambda a, b, f=function: f(a, 0) * b, (a, b))
    yield OpCase("x > y operator", operator.gt, (a, x(3)), whole)
    yield OpCase("0 < x operator", lambda a: 0 < a, (a,), whole)  # noqa: SIM300
    for name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
        function = getattr(torch, name)
        yield OpCase(f"{name}", lambda a, b, f=function: f(a > 0, b > 0), (a, b), whole)
    for name in ("logical_and", "logical_or", "logical_xor"):
        yield OpCase(name, getattr(torch, name), (a, b), whole)
    yield OpCase("~(x > 0)", lambda a: ~(a > 0), (a,), whole)
    yield OpCase("(x > 0) & (y > 0)", lambda a, b: (a > 0) & (b > 0), (a, b), whole)
    yield OpCase("(x > 0) | (y > 0)", lambda a, b: (a > 0) | (b > 0), (a, b), whole)
    yield OpCase("(x > 0) ^ (y > 0)", lambda a, b: (a > 0) ^ (b > 0), (a, b), whole)
    yield OpCase("logical_not", torch.logical_not, (a,), whole)


def reductions() -> Iterator[OpCase]:
    whole = "no derivative"
    for name in ("mean", "sum", "amax", "amin", "nanmean", "nansum"):
        yield from spell(name, inputs=(x(2, 3),))
        for dim in (0, -1, (0, 1), (-1, 0)):
            for keepdim in (False, True):
                yield from spell(name, dim, keepdim, inputs=(x(2, 3),))
        function = getattr(torch, name)
        yield OpCase(
            f"{name}(dim=(2, 3))", lambda a, f=function: f(a, dim=(2, 3)), (x(1, 2, 2, 2),)
        )
        yield OpCase(
            f"{name}(dim=[-1])", lambda a, f=function: f(a, dim=[-1], keepdim=True), (x(2, 2),)
        )
    for options in ({}, {"dim": 0}, {"dim": -1}, {"dim": 1, "keepdim": True}):
        yield from spell("prod", inputs=(x(2, 3, 2),), **options)
    yield OpCase("prod of one number", torch.prod, (x(),))
    yield OpCase("prod of a broadcast product", lambda a, b: (a * b).prod(1), (x(2, 3), x(3)))
    yield OpCase("prod of what does not vary", lambda a: a.expand(2, 3).prod(1), (x(2, 1),))
    yield OpCase("prod of no factors", lambda a: a[:, :0].prod(1) * a[:, 0], (x(2, 3),))
    yield OpCase("prod of 65 factors", lambda a: a.prod(), (pos(65),),
                 "beyond 64 factors all must scale alike", 1)  # fmt: skip
    yield OpCase("x.mean(axis)", lambda a: a.mean(axis=1), (x(2, 3),))
    yield OpCase("x.sum(0, 2)", lambda a: a.sum((0, 2)), (x(2, 3, 2),))
    yield OpCase("aten.mean.dim", lambda a: aten.mean.dim(a, [-1, -2], True), (x(1, 2, 2),))
    for name in ("norm", "vector_norm"):
        function = getattr(torch, name, torch.linalg.vector_norm)
        yield OpCase(name, function, (x(2, 3),))
        yield OpCase(f"{name} p=0", lambda a, f=function: f(a, 0), (x(2, 3),), whole, 0)
        for p in (1, 2, 3, float("inf")):
            yield OpCase(f"{name} p={p}", lambda a, f=function, p=p: f(a, p), (x(2, 3),))
            yield OpCase(f"{name} p={p} of rows", lambda a, f=function, p=p: f(a, p, 1), (x(2, 3),))
        yield OpCase(
            f"{name} by names", lambda a, f=function: f(a, dim=(0, -1), keepdim=True), (x(2, 3, 2),)
        )
    yield OpCase("x.norm", lambda a: a.norm(2, 0, True), (x(3, 2),))
    counted = torch.linalg.vector_norm
    yield OpCase("linalg.vector_norm(ord=0)", lambda a: counted(a, ord=0), (x(3),), whole, 0)
    yield OpCase("linalg.norm", torch.linalg.norm, (x(2, 3),), "no rule")
    rows = aten.linalg_vector_norm.default
    yield OpCase("aten.vector_norm", lambda a: rows(a, 2, [1]), (x(2, 3),))
    yield OpCase("x / norm", lambda a: a / a.norm(), (x(2, 3),))
    for name in ("var", "std"):
        yield from spell(name, inputs=(x(2, 3),))
        yield from spell(name, 1, inputs=(x(2, 3),))
        function = getattr(torch, name)
        yield OpCase(f"{name}(unbiased)", lambda a, f=function: f(a, False), (x(2, 3),))

        def by_names(a: Tensor, f: Callable[..., Any] = function) -> Any:
            return f(a, dim=-1, keepdim=True, correction=0)

        yield OpCase(f"{name} by names", by_names, (x(2, 3),))
    for name in ("max", "min"):
        yield from spell(name, inputs=(x(2, 3),))
        yield from spell(name, inputs=(x(2, 3), x(3)))
        for dim in (0, -1):
            yield from spell(name, dim, inputs=(x(2, 3),))
            yield from spell(name, dim, True, inputs=(x(2, 3),))
        function = getattr(torch, name)
        yield OpCase(
            f"{name} by names", lambda a, f=function: f(a, dim=1, keepdim=True)[0], (x(2, 3),)
        )
        yield OpCase(f"{name}(other=)", lambda a, b, f=function: f(a, other=b), (x(2, 3), x(2, 3)))
    ranked = "ranks are taken to mix all axes"
    for name in ("median", "nanmedian"):
        yield from spell(name, inputs=(x(2, 3),))
        yield from spell(name, 1, inputs=(x(2, 3),), slack=ranked)
        yield from spell(name, 0, True, inputs=(x(3, 2),), slack=ranked)
    yield from spell("mode", 1, inputs=(x(2, 3),), slack=ranked)
    yield from spell("kthvalue", 2, inputs=(x(2, 3),), slack=ranked)
    yield from spell("topk", 2, inputs=(x(2, 3),), slack=ranked)
    yield from spell("sort", inputs=(x(2, 3),), slack=ranked)
    for name in ("argmax", "argmin", "argsort"):
        yield from spell(name, inputs=(x(2, 3),), slack=whole)
        yield from spell(name, 0, inputs=(x(2, 3),), slack=whole)
        yield from spell(name, -1, inputs=(x(2, 3),), slack=whole)
    for name in ("cumsum", "cummax", "cummin", "logcumsumexp"):
        yield from spell(name, 1, inputs=(x(2, 3),))
        yield from spell(name, -2, inputs=(x(2, 3),))
    for args in ((), (1, 0), (2,)):
        yield from spell("diff", *args, inputs=(x(4, 3),))
    yield OpCase(
        "diff(prepend=)", lambda a, b: torch.diff(a, prepend=b), (x(2, 3), x(2, 1)), "no rule"
    )
    yield OpCase("cumsum(dim=)", lambda a: torch.cumsum(a, dim=0), (x(3, 2),))
    yield OpCase("layer norm by hand", _layer_norm, (x(2, 3),))


def _layer_norm(a: Tensor) -> Tensor:
    return (a - a.mean(-1, keepdim=True)) / (a.var(-1, keepdim=True) + 1e-2).sqrt() + 0 * F.relu(a)


CASES = [*sums(), *products(), *side_by_side(), *choices(), *reductions()]
