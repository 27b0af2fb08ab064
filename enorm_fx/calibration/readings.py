"""What a torch call reads: an activation, a weight, and how their entries meet.

One function for each family of calls. It is given the call's arguments and yields a `Reading` for
each weight that may be among them; whether it is one is the caller's to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Arrange = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """An activation and the tensor, a weight or a view of one, that it is contracted with.

    activation: gives it (attention computes what its output projection reads when asked).
    kept:       its axes along which the weight tells entries apart: the channels, for most.
    arrange:    brings values along those axes into a shape that broadcasts against the weight, so
                that each weight entry meets the value of what it is multiplied by.
    outputs:    axes of the weight that number the outputs; the others are contracted. Where `split`
                is more than 1, the first axis is split into so many parts and a rest before.
    call:       the output, without bias, for any weight of that shape.
    """

    activation: Callable[[], Tensor]
    weight: Tensor
    kept: tuple[int, ...]
    arrange: Arrange
    outputs: tuple[int, ...]
    call: Callable[[Tensor], Tensor]
    split: int = 1


def readings(key: str, function: Any, args: tuple[Any, ...], kwargs: Any) -> Iterator[Reading]:
    """The readings of a call; none if it is of no kind that is known here.

    key: the neutral key of the function.
    """
    reader = _READERS.get(key)
    return reader(function, *args, **kwargs) if reader else iter(())


def _linear(function: Any, input: Tensor, weight: Tensor, bias: Any = None) -> Iterator[Reading]:
    """y[..., o] = sum_i x[..., i] weight[o, i]."""
    if weight.dim() == 2:
        yield Reading(
            lambda: input, weight, (-1,), lambda x: x[None], (0,), lambda w: function(input, w)
        )


def _convolution(
    function: Any, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Iterator[Reading]:  # fmt: skip
    """weight (O, C / groups, *kernel): output o reads the channels of its own group."""
    space = weight.dim() - 2

    def arrange(x: Tensor) -> Tensor:
        per_group = x.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
        rows = x[None] if groups == 1 else per_group.reshape(weight.shape[0], -1)
        return rows.view(*rows.shape, *(1,) * space)

    def call(w: Tensor) -> Tensor:
        return function(input, w, None, stride, padding, dilation, groups)  # type: ignore[no-any-return]

    yield Reading(lambda: input, weight, (-1 - space,), arrange, (0,), call)


def _transposed_convolution(
    function: Any, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Iterator[Reading]:  # fmt: skip
    """weight (C, O / groups, *kernel): an output of a group reads the group's channels."""
    space = weight.dim() - 2

    def call(w: Tensor) -> Tensor:
        return function(  # type: ignore[no-any-return]
            input, w, None, stride, padding, output_padding, groups, dilation
        )

    def arrange(x: Tensor) -> Tensor:
        return x.view(-1, *(1,) * (space + 1))

    outputs = (1,) if groups == 1 else (0, 2)
    yield Reading(lambda: input, weight, (-1 - space,), arrange, outputs, call, split=groups)


def _product(function: Any, *args: Any, out: Any = None, **kwargs: Any) -> Iterator[Reading]:
    """x @ w, w @ x, and sums with such a product: either factor may be the weight."""
    left, right = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)][-2:]
    if _name(function) == "__rmatmul__":
        left, right = right, left
    if right.dim() == 2:
        yield Reading(lambda: left, right, (-1,), lambda x: x[:, None], (1,), lambda w: left @ w)
    elif right.dim() == 3 == left.dim() and len(left) == len(right):
        yield Reading(
            lambda: left, right, (0, -1), lambda x: x[..., None], (0, 2), lambda w: left @ w
        )
    if left.dim() == 2:
        channels = (-2,) if right.dim() > 1 else (-1,)
        yield Reading(lambda: right, left, channels, lambda x: x[None], (0,), lambda w: w @ right)
    elif left.dim() == 3 == right.dim() and len(left) == len(right):
        yield Reading(
            lambda: right, left, (0, -2), lambda x: x[:, None], (0, 1), lambda w: w @ right
        )


def _einsum(function: Any, equation: Any, *operands: Any) -> Iterator[Reading]:
    """Products of two tensors' entries, summed over every letter that the result does not have."""
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    plain = isinstance(equation, str) and "." not in equation and "->" in equation
    if not plain or len(operands) != 2:
        return
    factors, _, result = equation.replace(" ", "").partition("->")
    letters = factors.split(",")
    if all(len(set(word)) == len(word) for word in letters):
        for at in (0, 1):
            yield _einsum_reading(function, equation, letters, result, operands, at)


def _einsum_reading(
    function: Any, equation: str, letters: list[str], result: str, operands: Any, at: int
) -> Reading:
    """The reading in which the operand number `at` is the weight."""
    own, other = letters[at], letters[1 - at]
    shared = [letter for letter in other if letter in own]

    def arrange(x: Tensor) -> Tensor:
        ordered = x.permute([shared.index(letter) for letter in own if letter in shared])
        sizes = iter(ordered.shape)
        return ordered.reshape([next(sizes) if letter in shared else 1 for letter in own])

    def call(w: Tensor) -> Tensor:
        pair = (w, operands[1]) if at == 0 else (operands[0], w)
        return function(equation, *pair)  # type: ignore[no-any-return]

    return Reading(
        lambda: operands[1 - at], operands[at], tuple(other.index(letter) for letter in shared),
        arrange, tuple(k for k, letter in enumerate(own) if letter in result), call,
    )  # fmt: skip


def _attention(
    function: Any, query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int,
    num_heads: int, in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, bias_k: Any,
    bias_v: Any, add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor,
    out_proj_bias: Any, **options: Any,
) -> Iterator[Reading]:  # fmt: skip
    """The three input projections, and the output projection of what the heads give."""
    separate = [options.get(f"{name}_proj_weight") for name in "qkv"]
    weights = separate if in_proj_weight is None else in_proj_weight.chunk(3)
    for x, weight in zip((query, key, value), weights, strict=True):
        if weight is not None:
            yield from _linear(F.linear, x, weight)

    @cache
    def mixed() -> Tensor:
        """What the output projection reads: the result where it is the identity."""
        identity = torch.eye(
            out_proj_weight.shape[1], dtype=out_proj_weight.dtype, device=out_proj_weight.device
        )
        return function(  # type: ignore[no-any-return]
            query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k,
            bias_v, add_zero_attn, dropout_p, identity, None, **options,
        )[0]  # fmt: skip

    yield Reading(
        mixed, out_proj_weight, (-1,), lambda x: x[None], (0,), lambda w: F.linear(mixed(), w)
    )


def _name(function: Any) -> str:
    return getattr(function, "__name__", "")


_READERS: dict[str, Callable[..., Iterator[Reading]]] = {
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution
    ),
    **dict.fromkeys(
        ("matmul", "rmatmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm"), _product
    ),
    "einsum": _einsum,
    "multi_head_attention_forward": _attention,
}
