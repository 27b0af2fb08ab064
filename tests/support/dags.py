"""Random networks that are no chains: recipes of ops over a pool of tensors.

A recipe is data: the shapes of the inputs, and steps that each take tensors of the pool and put
one more into it. The same recipe always builds the same model, with the same parameters.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Shape = tuple[int, ...]
T = TypeVar("T")
Pick = Callable[[Sequence[T]], T]

LARGEST = 2048  # entries of a tensor
BOUND = 1e4  # size of a number


@dataclass(frozen=True)
class Step:
    """One op on tensors of the pool, by number; the options say which variant."""

    op: str
    operands: tuple[int, ...]
    option: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A whole network."""

    inputs: tuple[Shape, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """options: the variants that operands of these shapes admit; none where they do not fit.
    layer: the module with the parameters of a variant, if it has any.
    """

    arity: int
    options: Callable[..., list[tuple[Any, ...]]]
    run: Callable[..., Tensor]
    layer: Callable[..., nn.Module] | None = None


OPS: dict[str, Op] = {}
KINDS: dict[str, list[str]] = {}
ONCE: list[tuple[Any, ...]] = [()]


def put(
    kind: str, name: str, run: Callable[..., Tensor], options: Any = None, layer: Any = None,
    arity: int = 1,
) -> None:  # fmt: skip
    OPS[name] = Op(arity, options or (lambda *shapes: ONCE), run, layer)
    KINDS.setdefault(kind, []).append(name)


def axes(shape: Shape) -> list[tuple[Any, ...]]:
    return [(a,) for a in range(len(shape))]


def later(shape: Shape) -> list[tuple[Any, ...]]:
    return [(a,) for a in range(1, len(shape))]


def image(shape: Shape) -> list[tuple[Any, ...]]:
    return ONCE if len(shape) == 4 else []


def large_image(shape: Shape) -> list[tuple[Any, ...]]:
    return ONCE if len(shape) == 4 and min(shape[2:]) > 1 else []


# --- layers with weights -----------------------------------------------------------------------


def apply(layer: nn.Module, x: Tensor, *option: Any) -> Tensor:
    return layer(x)  # type: ignore[no-any-return]


def _convolutions(shape: Shape) -> list[tuple[Any, ...]]:
    if len(shape) != 4:
        return []
    c = shape[1]
    return [
        (out, size, groups, bias)
        for out in (4, 6)
        for size in (1, 3)
        for groups in (1, 2, c)
        for bias in (True, False)
        if c % groups == 0 and out % groups == 0
    ]


def _convolution(shape: Shape, out: int, size: int, groups: int, bias: bool) -> nn.Module:
    return nn.Conv2d(shape[1], out, size, padding=size // 2, groups=groups, bias=bias)


def _transposed(shape: Shape, out: int, size: int, groups: int, bias: bool) -> nn.Module:
    stride = 2 if size == 3 and shape[2] < 4 else 1
    return nn.ConvTranspose2d(shape[1], out, size, stride=stride, groups=groups, bias=bias)


class Holder(nn.Module):
    """A parameter that is used as it is."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(shape))


class Constant(nn.Module):
    """A buffer that is used as it is."""

    p: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("p", torch.zeros(shape))


def _partial_shapes(shape: Shape) -> list[tuple[Any, ...]]:
    """Shapes that broadcast against this one, without growing it."""
    n = len(shape)
    return [
        (tuple(shape[a:]),) for a in range(n)
    ] + [(tuple(s if b == a else 1 for b, s in enumerate(shape)),) for a in range(n)]  # fmt: skip


def _held(shape: Shape, own: Shape) -> nn.Module:
    return Holder(*own)


def _constant(shape: Shape, own: Shape) -> nn.Module:
    return Constant(*own)


def _equation(ndim: int, last: bool) -> str:
    """x times p[i, o] along axis 1, or along the last one."""
    axis, letters = ndim - 1 if last else 1, "bcde"[:ndim]
    left, right = letters[:axis], letters[axis + 1 :]
    return f"{left}i{right},io->{left}o{right}"


def _linear(shape: Shape, out: int, bias: bool) -> nn.Module:
    return nn.Linear(shape[-1], out, bias)


def _widths(shape: Shape) -> list[tuple[Any, ...]]:
    return [(out, bias) for out in (4, 6, 3) for bias in (True, False)]


put("weight", "linear", apply, _widths, _linear)
put("weight", "conv", apply, _convolutions, _convolution)
put("weight", "conv_transpose", apply, _convolutions, _transposed)
put(
    "weight", "conv1d", apply,
    lambda s: [(k, g) for k in (1, 3) for g in (1, s[1])] if len(s) == 3 else [],
    lambda s, k, g: nn.Conv1d(s[1], s[1], k, padding=k // 2, groups=g),
)  # fmt: skip
put(
    "weight", "functional linear", lambda m, x, *o: F.linear(x, m.p),
    lambda s: [(4,), (6,)], lambda s, out: Holder(out, s[-1]),
)  # fmt: skip
put(
    "weight", "matmul p", lambda m, x, *o: x @ m.p,
    lambda s: [(4,), (3,)], lambda s, out: Holder(s[-1], out),
)  # fmt: skip
put(
    "weight", "matmul p.t", lambda m, x, *o: x @ m.p.t(),
    lambda s: [(4,), (3,)], lambda s, out: Holder(out, s[-1]),
)  # fmt: skip
put(
    "weight", "p matmul", lambda m, x, *o: m.p @ x,
    lambda s: [(4,), (3,)], lambda s, out: Holder(out, s[-2]),
)  # fmt: skip
put(
    "weight",
    "einsum p",
    lambda m, x, *o: torch.einsum(_equation(x.ndim, len(o) > 1), x, m.p),
    lambda s: [(4,)] + ([(4, "last")] if s[-1] == s[1] else []),
    lambda s, out, *o: Holder(s[1], out),
)
put("use", "times p", lambda m, x, *o: x * m.p, _partial_shapes, _held)
put("use", "plus p", lambda m, x, *o: x + m.p, _partial_shapes, _held)
put("use", "p minus", lambda m, x, *o: m.p - x, _partial_shapes, _held)
put("use", "over p", lambda m, x, *o: x / (m.p.abs() + 0.1), _partial_shapes, _held)
put("use", "max with p", lambda m, x, *o: torch.maximum(x, m.p), _partial_shapes, _held)
put("use", "cat p", lambda m, x, a: torch.cat([x, m.p], a), axes,
    lambda s, a: Holder(*(1 if b == a else n for b, n in enumerate(s))))  # fmt: skip
put("use", "prelu", apply, later, lambda s, a: nn.PReLU(s[1] if a == 1 else 1))
put("use", "layer_norm", apply, lambda s: [(1,), (2,)] if len(s) > 2 else [(1,)],
    lambda s, n: nn.LayerNorm(s[-n:]))  # fmt: skip
put("use", "rms_norm", apply, None, lambda s: nn.RMSNorm(s[-1]))
put(
    "use", "batch_norm", apply, lambda s: [(True,), (False,)],
    lambda s, affine: (nn.BatchNorm1d if len(s) < 4 else nn.BatchNorm2d)(s[1], affine=affine),
)  # fmt: skip
put("use", "group_norm", apply,
    lambda s: [(g,) for g in (1, 2, s[1]) if s[1] % g == 0 and math.prod(s) > g],
    lambda s, g: nn.GroupNorm(g, s[1]))  # fmt: skip

# --- ops that pass a scale ---------------------------------------------------------------------

put("pass", "relu", lambda m, x: x.relu())
put("pass", "leaky_relu", lambda m, x: F.leaky_relu(x, 0.2))
put("pass", "abs", lambda m, x: x.abs())
put("pass", "neg", lambda m, x: -x)
put("pass", "square", lambda m, x: x.square())
put("pass", "cube", lambda m, x: 0.1 * x**3)
put("pass", "root", lambda m, x: x.abs().sqrt())
put("pass", "clamp", lambda m, x: x.clamp(min=0))
put("pass", "twice", lambda m, x: x * 2 / 3)
put("pass", "where", lambda m, x: torch.where(x > 0, x, 0.5 * x))
put("pass", "masked", lambda m, x: x.masked_fill(x < 0, 0.0))
put("pass", "cumsum", lambda m, x, a: x.cumsum(a), axes)
put("pass", "times constant", lambda m, x, *o: x * m.p, _partial_shapes, _constant)

# --- ops that do not ---------------------------------------------------------------------------

put("stop", "sigmoid", lambda m, x: x.sigmoid())
put("stop", "tanh", lambda m, x: x.tanh())
put("stop", "gelu", lambda m, x: F.gelu(x))
put("stop", "softmax", lambda m, x, a: x.softmax(a), axes)
put("stop", "clamp to one", lambda m, x: x.clamp(0, 1))
put("stop", "plus one", lambda m, x: x + 1)
put("stop", "plus constant", lambda m, x, *o: x + m.p, _partial_shapes, _constant)
put("stop", "where positive", lambda m, x: torch.where(x > 0, x, 1.0))
put("stop", "step", lambda m, x: (x > 0).to(x.dtype))
put("stop", "pad with 1", lambda m, x, a: F.pad(x, (0, 0) * (x.ndim - 1 - a) + (1, 1), value=1.0),
    later)  # fmt: skip

# --- shapes and positions ----------------------------------------------------------------------


def _swaps(shape: Shape) -> list[tuple[Any, ...]]:
    n = len(shape)
    return [(a, b) for a in range(n) for b in range(a + 1, n)]


def _parts(shape: Shape) -> list[tuple[Any, ...]]:
    return [(a, k) for a, n in enumerate(shape) if n > 1 for k in range(2)]


def _slices(shape: Shape) -> list[tuple[Any, ...]]:
    return [
        (a, start, stop, step)
        for a, n in enumerate(shape) if n > 2
        for start, stop, step in ((0, n, 2), (1, n, 1), (0, n - 1, 1), (1, n, 2))
    ]  # fmt: skip


def _sliced(m: Any, x: Tensor, axis: int, start: int, stop: int, step: int) -> Tensor:
    return x[(slice(None),) * axis + (slice(start, stop, step),)]


def _splits(shape: Shape) -> list[tuple[Any, ...]]:
    return [(a, b) for a, n in enumerate(shape) for b in (2, 3) if n % b == 0 and len(shape) < 4]


def _split_axis(m: Any, x: Tensor, axis: int, by: int) -> Tensor:
    return x.reshape(*x.shape[:axis], by, x.shape[axis] // by, *x.shape[axis + 1 :])


def _merges(shape: Shape) -> list[tuple[Any, ...]]:
    return [(a,) for a in range(len(shape) - 1)] if len(shape) > 2 else []


def _reductions(shape: Shape) -> list[tuple[Any, ...]]:
    return [(a, k) for a in range(len(shape)) for k in (True, False) if k or len(shape) > 2]


def _pairs_of_axes(shape: Shape) -> list[tuple[Any, ...]]:
    n = len(shape)
    return [((a, b), k) for a, b in _swaps(shape) for k in (True, False) if k or n == 4]


def _growths(shape: Shape) -> list[tuple[Any, ...]]:
    return [(a,) for a, n in enumerate(shape) if n == 1]


def _shuffles(shape: Shape) -> list[tuple[Any, ...]]:
    return ONCE if len(shape) == 4 and shape[1] % 2 == 0 else []


put("shape", "transpose", lambda m, x, a, b: x.transpose(a, b), _swaps)
put("shape", "permute", lambda m, x: x.permute(-1, *range(x.ndim - 1)))
put("shape", "flatten", lambda m, x, a: x.flatten(a, a + 1), _merges)
put("shape", "flatten all", lambda m, x: x.flatten(1), lambda s: ONCE if len(s) > 2 else [])
put("shape", "split axis", _split_axis, _splits)
put("shape", "new axis", lambda m, x, a: x.unsqueeze(a), lambda s: axes(s) if len(s) < 4 else [])
put("shape", "chunk", lambda m, x, a, k: x.chunk(2, a)[k], _parts)
put("shape", "split", lambda m, x, a, k: x.split([1, x.shape[a] - 1], a)[k], _parts)
put("shape", "slice", _sliced, _slices)
put("shape", "flip", lambda m, x, a: x.flip(a), axes)
put("shape", "roll", lambda m, x, a: x.roll(1, a), axes)
put("shape", "expand", lambda m, x, a: x.expand([3 if b == a else -1 for b in range(x.ndim)]),
    _growths)  # fmt: skip
put("shape", "repeat", lambda m, x, a: x.repeat_interleave(2, a), axes)
put("shape", "mean", lambda m, x, a, k: x.mean(a, keepdim=k), _reductions)
put("shape", "sum", lambda m, x, a, k: x.sum(a, keepdim=k), _reductions)
put("shape", "amax", lambda m, x, a, k: x.amax(a, keepdim=k), _reductions)
put("shape", "mean of two", lambda m, x, a, k: x.mean(a, keepdim=k), _pairs_of_axes)
put("shape", "norm", lambda m, x, a, k: x.norm(dim=a, keepdim=k), _reductions)
put("shape", "max_pool", lambda m, x: F.max_pool2d(x, 2), large_image)
put("shape", "avg_pool", lambda m, x: F.avg_pool2d(x, 3, 1, 1), large_image)
put("shape", "adaptive pool", lambda m, x: F.adaptive_avg_pool2d(x, 2), image)
put("shape", "pad", lambda m, x, a: F.pad(x, (0, 0) * (x.ndim - 1 - a) + (1, 1)), later)
put("shape", "interpolate", lambda m, x: F.interpolate(x, scale_factor=2), image)
put("shape", "bilinear", lambda m, x: F.interpolate(x, (3, 3), mode="bilinear"), image)
put("shape", "pixel_shuffle", lambda m, x: F.pixel_shuffle(x, 2),
    lambda s: ONCE if len(s) == 4 and s[1] % 4 == 0 else [])  # fmt: skip
put("shape", "channel_shuffle",
    lambda m, x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2), _shuffles)  # fmt: skip
put("shape", "stack and sum", lambda m, x, a: torch.stack([x, -x.relu()], a).sum(a), axes)

# --- in place, on a tensor of one's own --------------------------------------------------------


def _write_relu(m: Any, x: Tensor) -> Tensor:
    return x.clone().relu_()


def _write_part(m: Any, x: Tensor, axis: int, part: int) -> Tensor:
    y = x.clone()
    y.narrow(axis, part, 1).relu_()
    return y


def _write_zero(m: Any, x: Tensor, axis: int, part: int) -> Tensor:
    y = x.clone()
    y[(slice(None),) * axis + (part,)] = 0
    return y


def _write_number(m: Any, x: Tensor) -> Tensor:
    y = x.clone()
    y[..., 0] = 1
    return y


def _write_other(m: Any, x: Tensor, other: Tensor) -> Tensor:
    y = x.clone()
    y[..., :1] = other[..., -1:]
    return y


def _write_into_zeros(m: Any, x: Tensor, other: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., 1:] = x[..., 1:]
    y[..., :1] += other[..., -1:]
    return y


def _add_in_place(m: Any, x: Tensor, other: Tensor) -> Tensor:
    y = x.clone()
    y += other
    return y


def same(a: Shape, b: Shape) -> list[tuple[Any, ...]]:
    return ONCE if a == b else []


def broadcastable(a: Shape, b: Shape) -> list[tuple[Any, ...]]:
    return ONCE if all(
        m == n or 1 in (m, n) for m, n in zip(a[::-1], b[::-1], strict=False)
    ) else []  # fmt: skip


put("write", "relu_", _write_relu)
put("write", "part relu_", _write_part, _parts)
put("write", "part zero_", _write_zero, _parts)
put("write", "part one", _write_number)
put("write", "part of another", _write_other, same, None, 2)
put("write", "into zeros", _write_into_zeros, same, None, 2)
put("write", "add_", _add_in_place, same, None, 2)
# These write into the pool: whatever else looks at that memory changes too.
put("write", "pool relu_", lambda m, x: x.relu_())
put("write", "pool mul_", lambda m, x: x.mul_(0.5))

# --- two tensors -------------------------------------------------------------------------------


def _cats(a: Shape, b: Shape) -> list[tuple[Any, ...]]:
    if len(a) != len(b):
        return []
    differ = [i for i, (m, n) in enumerate(zip(a, b, strict=True)) if m != n]
    return axes(a) if not differ else [(differ[0],)] if len(differ) == 1 else []


def _products(a: Shape, b: Shape) -> list[tuple[Any, ...]]:
    if len(a) < 3 or len(a) != len(b) or a[:-2] != b[:-2]:
        return []
    return ([(False,)] if a[-1] == b[-2] else []) + ([(True,)] if a[-1] == b[-1] else [])


def _sequences(a: Shape, b: Shape) -> list[tuple[Any, ...]]:
    fits = len(a) > 2 and len(a) == len(b) and a[:-2] == b[:-2] and a[-1] == b[-1]
    return [(False,), (True,)] if fits else []


def _einsum(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("bic,bjc->bij", x, y)


put("join", "add", lambda m, x, y: x + y, broadcastable, None, 2)
put("join", "sub", lambda m, x, y: x - 0.7 * y, broadcastable, None, 2)
put("join", "mul", lambda m, x, y: x * y, broadcastable, None, 2)
put("join", "div", lambda m, x, y: x / (y.abs() + 1), broadcastable, None, 2)
put("join", "maximum", lambda m, x, y: torch.maximum(x, y), broadcastable, None, 2)
put("join", "where joined", lambda m, x, y: torch.where(x > 0, x, y), broadcastable, None, 2)
put("join", "where compared", lambda m, x, y: torch.where(x > y, x, 0.5 * y), same, None, 2)
put("join", "gated", lambda m, x, y: x * y.sigmoid(), broadcastable, None, 2)
put("join", "relu gated", lambda m, x, y: x * y.relu(), broadcastable, None, 2)
put("join", "cat", lambda m, x, y, a: torch.cat([x, y], a), _cats, None, 2)
put("join", "stack", lambda m, x, y, a: torch.stack([x, y], a).sum(a),
    lambda a, b: axes(a) if a == b else [], None, 2)  # fmt: skip
put("join", "stack max", lambda m, x, y, a: torch.stack([x, y], a).amax(a),
    lambda a, b: axes(a) if a == b else [], None, 2)  # fmt: skip
put("join", "matmul", lambda m, x, y, t: x @ (y.transpose(-2, -1) if t else y), _products, None, 2)
put("join", "einsum", _einsum,
    lambda a, b: ONCE if len(a) == len(b) == 3 and a[::2] == b[::2] else [], None, 2)  # fmt: skip
put("join", "outer", lambda m, x, y: torch.einsum("bi,bj->bij", x, y),
    lambda a, b: ONCE if len(a) == len(b) == 2 and a[0] == b[0] else [], None, 2)  # fmt: skip
put("join", "attention",
    lambda m, q, k, causal: F.scaled_dot_product_attention(q, k, k.relu(), is_causal=causal),
    _sequences, None, 2)  # fmt: skip
put("join", "lerp", lambda m, x, y: torch.lerp(x, y, 0.3), same, None, 2)

AGAIN = "again"  # the layer of an earlier step, once more
_CHANCES = [
    *["weight"] * 8, *["pass"] * 6, *["shape"] * 6, *["join"] * 5, *["use"] * 2, *["write"] * 2,
    *["stop"] * 2, AGAIN,
]  # fmt: skip
INPUTS: list[Shape] = [
    (2, 4), (3, 6), (2, 3, 4), (2, 4, 4), (2, 4, 3, 3), (2, 4, 4, 4), (2, 6, 2, 3),
]  # fmt: skip

# --- recipe to model ---------------------------------------------------------------------------


def fill(layer: nn.Module, seed: int) -> nn.Module:
    """Random parameters and statistics, in float64 and in evaluation."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, dtype=torch.float64, generator=generator)

    layer = layer.double().eval()
    with torch.no_grad():
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            fan_in = tensor[0].numel() if tensor.ndim > 1 and name != "p" else 1
            values = draw(tensor) / fan_in**0.5
            tensor.copy_(0.5 + values.abs() if name == "running_var" else values)
    return layer


def tensors_for(recipe: Recipe, seed: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in recipe.inputs
    )


class Replay(nn.Module):
    """The network of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.layers = nn.ModuleDict()
        with torch.no_grad():
            pool = [x.clone() for x in tensors_for(recipe)]
            for number, step in enumerate(recipe.steps):
                self.add(number, step, [tuple(pool[i].shape) for i in step.operands])
                pool.append(self.compute(number, step, pool))

    def add(self, number: int, step: Step, shapes: list[Shape]) -> None:
        """Make the layer of a step, if it has one of its own."""
        make = None if step.op == AGAIN else OPS[step.op].layer
        if make is not None:
            self.layers[str(number)] = fill(make(*shapes, *step.option), number)

    def compute(self, number: int, step: Step, pool: list[Tensor]) -> Tensor:
        if step.op == AGAIN:
            number = step.option[0]
            step = Step(self.recipe.steps[number].op, step.operands,
                        self.recipe.steps[number].option)  # fmt: skip
        layer = dict(self.layers.items()).get(str(number))
        return OPS[step.op].run(layer, *(pool[i] for i in step.operands), *step.option)

    def pool(self, *inputs: Tensor) -> list[Tensor]:
        pool = list(inputs)
        for number, step in enumerate(self.recipe.steps):
            pool.append(self.compute(number, step, pool))
        return pool

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        pool = self.pool(*inputs)
        return tuple(pool[i] for i in self.recipe.outputs)


# --- drawing -----------------------------------------------------------------------------------


def draw_recipe(pick: Pick[Any]) -> Recipe:
    """A recipe, all its choices made by `pick(sequence)`."""
    inputs = tuple(pick(INPUTS) for _ in range(pick([1, 1, 2])))
    growing = Replay(Recipe(inputs, (), ()))
    pool = [x.clone() for x in tensors_for(growing.recipe)]
    steps: list[Step] = []
    wanted = pick(range(3, 11))
    for number in range(wanted):
        last = number == wanted - 1
        kind = "weight" if number == 0 or (last and pick([*[True] * 5, False])) else pick(_CHANCES)
        first = len(pool) - 1 if last or pick([True, True, False]) else pick(range(len(pool)))
        if kind not in ("weight", "use") and first < len(inputs):
            first = len(pool) - 1  # what has the inputs' scale is fixed anyhow
        step = _draw_step(pick, kind, first, pool, steps, len(inputs))
        growing.recipe = Recipe(inputs, (*steps, step), ())
        growing.add(number, step, [tuple(pool[i].shape) for i in step.operands])
        with torch.no_grad():
            result = growing.compute(number, step, pool)
        if result.numel() > LARGEST or not 2 <= result.ndim <= 4:
            step = Step("leaky_relu", (first,))
            if str(number) in growing.layers:
                del growing.layers[str(number)]
            result = F.leaky_relu(pool[first], 0.2)
        steps.append(step)
        pool.append(result)
    more = pick([0, 0, 0, 0, 1, 2])
    outputs = {len(pool) - 1, *(pick(range(len(inputs), len(pool))) for _ in range(more))}
    return Recipe(inputs, tuple(steps), tuple(sorted(outputs, reverse=True)))


def _draw_step(
    pick: Pick[Any], kind: str, first: int, pool: list[Tensor], steps: list[Step], inputs: int
) -> Step:
    shapes = [tuple(x.shape) for x in pool]
    if kind == AGAIN:
        earlier = [
            (number, i)
            for number, step in enumerate(steps)
            if step.op != AGAIN and OPS[step.op].layer is not None
            for i, shape in enumerate(shapes)
            if shape == shapes[step.operands[0]]
        ]
        if earlier:
            number, operand = pick(earlier)
            return Step(AGAIN, (operand,), (number,))
        kind = "pass"
    names = [name for name in KINDS[kind] if _fits(name, first, pool, inputs)]
    if not names:
        return Step("relu", (first,))
    op = OPS[name := pick(names)]
    if op.arity == 1:
        return Step(name, (first,), pick(op.options(shapes[first])))
    fitting = [i for i in range(len(pool)) if op.options(shapes[first], shapes[i])]
    second = pick([i for i in fitting if i >= inputs and i != first] or fitting)
    return Step(name, (first, second), pick(op.options(shapes[first], shapes[second])))


def _fits(name: str, first: int, pool: list[Tensor], inputs: int) -> bool:
    op, shape = OPS[name], tuple(pool[first].shape)
    if name.startswith("pool "):  # never the caller's tensors, nor overlapping memory
        own = pool[first].untyped_storage().data_ptr()
        shared = any(x.untyped_storage().data_ptr() == own for x in pool[:inputs])
        return not shared and 0 not in pool[first].stride()
    if op.arity == 1:
        return bool(op.options(shape))
    return any(op.options(shape, tuple(x.shape)) for x in pool)


@st.composite
def recipes(draw: Any) -> Recipe:
    return draw_recipe(lambda choices: draw(st.sampled_from(choices)))


def seeded_recipe(seed: int) -> Recipe:
    return draw_recipe(random.Random(seed).choice)
