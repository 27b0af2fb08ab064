"""What calls read, held against their derivatives.

The output of a contraction is linear in its weight, and the derivative by an entry of the weight is
the activation that the entry is multiplied by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from enorm_fx.calibration.readings import Reading, readings
from enorm_fx.tracing.op_keys import op_key


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


CALLS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": ((2, 3, 4), (5, 4), F.linear),
    "linear, one row": ((4,), (5, 4), lambda x, w: F.linear(x, weight=w)),
    "product": ((2, 3, 4), (4, 5), lambda x, w: x @ w),
    "product, one row": ((4,), (4, 5), torch.matmul),
    "product of columns": ((4, 3), (5, 4), lambda x, w: w @ x),
    "product of many columns": ((2, 4, 3), (5, 4), lambda x, w: torch.matmul(w, x)),
    "product of one column": ((4,), (5, 4), lambda x, w: torch.mv(w, x)),
    "reflected product": ((3, 4), (4, 5), lambda x, w: w.__rmatmul__(x)),
    "sum and product": ((3, 4), (4, 5), lambda x, w: torch.addmm(x.new_zeros(5), x, w, beta=2)),
    "transposed product": ((3, 4), (5, 4), lambda x, w: x.mm(w.t())),
    "batched products": ((2, 3, 4), (2, 4, 5), torch.bmm),
    "batched products of columns": ((2, 4, 3), (2, 5, 4), lambda x, w: w @ x),
    "einsum": ((2, 3, 4), (5, 4), lambda x, w: torch.einsum("btc,oc->bto", x, w)),
    "einsum, weight first": ((3, 4), (4, 5), lambda x, w: torch.einsum("co, tc -> ot", w, x)),
    "einsum by head": ((2, 3, 4), (3, 5, 4), lambda x, w: torch.einsum("bhc,hoc->bho", [x, w])),
    "einsum over two axes": ((2, 3, 4), (4, 5, 3), lambda x, w: torch.einsum("bhc,coh->bo", x, w)),
    "conv1d": ((2, 4, 5), (6, 4, 3), lambda x, w: F.conv1d(x, w, padding=2)),
    "conv2d": ((2, 4, 3, 3), (6, 4, 1, 2), lambda x, w: F.conv2d(x, w, padding=1)),
    "conv2d in groups": (
        (2, 4, 3, 3), (6, 2, 1, 2), lambda x, w: F.conv2d(x, w, padding=1, groups=2)
    ),
    "conv2d by channel": (
        (1, 4, 3, 3), (8, 1, 2, 2), lambda x, w: F.conv2d(x, w, None, 1, 1, 1, 4)
    ),
    "conv3d of one image": ((2, 2, 2, 2), (3, 2, 1, 1, 1), F.conv3d),
    "conv_transpose1d": ((2, 4, 3), (4, 3, 2), F.conv_transpose1d),
    "conv_transpose2d in groups": (
        (1, 4, 2, 2), (4, 3, 2, 1), lambda x, w: F.conv_transpose2d(x, w, stride=2, groups=2)
    ),
}  # fmt: skip


class Collect(TorchFunctionMode):
    """The readings of all calls that run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Reading] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += readings(op_key(func)[0], func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@contextmanager
def collecting() -> Iterator[list[Reading]]:
    collect = Collect()
    with torch.no_grad(), collect:
        yield collect.found


def reading_of(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> Reading:
    """The one reading by the weight."""
    with collecting() as found:
        call(x, w)
    memory = w.untyped_storage().data_ptr()
    [reading] = [r for r in found if r.weight.untyped_storage().data_ptr() == memory]
    return reading


def sizes_of(reading: Reading) -> Tensor:
    """max |x| where each entry of the weight meets it."""
    x = reading.activation()
    kept = [axis % x.dim() for axis in reading.kept]
    rest = [axis for axis in range(x.dim()) if axis not in kept]
    sizes = reading.arrange(x.abs().amax(rest) if rest else x.abs())
    return sizes.expand(reading.weight.shape)


@pytest.mark.parametrize("name", CALLS)
def test_an_entry_meets_what_the_derivative_says(name: str) -> None:
    x_shape, w_shape, call = CALLS[name]
    x, w = numbers(*x_shape), numbers(*w_shape, seed=1)
    reading = reading_of(call, x, w)
    # (outputs, *weight): the activation that an output takes by an entry of the weight.
    jacobian = torch.autograd.functional.jacobian(reading.call, reading.weight)
    met = jacobian.flatten(0, jacobian.dim() - reading.weight.dim() - 1).abs()
    largest = met.amax(0)
    kernel = tuple(range(2, largest.dim())) if "conv" in name else ()
    if kernel:  # each position of a kernel sees a part of the image
        largest = largest.amax(kernel, keepdim=True).expand(largest.shape)
    assert torch.allclose(sizes_of(reading), largest)


@pytest.mark.parametrize("name", CALLS)
def test_the_output_is_that_of_the_call(name: str) -> None:
    x_shape, w_shape, call = CALLS[name]
    x, w = numbers(*x_shape), numbers(*w_shape, seed=1)
    reading = reading_of(call, x, w)
    assert torch.allclose(reading.call(reading.weight), call(x, w))
    assert torch.allclose(reading.call(2 * reading.weight), 2 * call(x, w))


@pytest.mark.parametrize("name", CALLS)
def test_entries_of_different_outputs_share_none(name: str) -> None:
    x_shape, w_shape, call = CALLS[name]
    x, w = numbers(*x_shape), numbers(*w_shape, seed=1)
    reading = reading_of(call, x, w)
    jacobian = torch.autograd.functional.jacobian(reading.call, reading.weight)
    used = jacobian.flatten(0, jacobian.dim() - reading.weight.dim() - 1) != 0
    if reading.split > 1:
        used = used.unflatten(1, (reading.split, -1))
    rest = [a + 1 for a in range(used.dim() - 1) if a not in reading.outputs]
    slices = used.any(rest).flatten(1)  # (outputs of the call, outputs of the weight)
    assert slices.shape[1] > 1
    assert bool((slices.sum(1) <= 1).all())
    assert bool(slices.any(0).all())


def test_a_bias_is_left_out() -> None:
    x, w, b = numbers(3, 4), numbers(5, 4, seed=1), numbers(5, seed=2)
    reading = reading_of(lambda x, w: F.linear(x, w, b), x, w)
    assert torch.allclose(reading.call(w), F.linear(x, w))
    image, kernel = numbers(1, 2, 3, 3), numbers(4, 2, 1, 1)
    reading = reading_of(lambda x, w: F.conv2d(x, w, torch.ones(4).double()), image, kernel)
    assert torch.allclose(reading.call(kernel), F.conv2d(image, kernel))


@pytest.mark.parametrize("separate", [False, True])
def test_attention_reads_four_times(separate: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(
        4, 2, batch_first=True, **({"kdim": 3, "vdim": 5} if separate else {})
    )
    layer = layer.double().eval()
    inputs = [numbers(2, 3, n, seed=n) for n in ((4, 3, 5) if separate else (4, 4, 4))]
    with collecting() as found:
        (expected, _) = layer(*inputs, need_weights=False)
    query, key, value, out = found
    for reading, x, name in zip((query, key, value), inputs, "qkv", strict=True):
        assert torch.equal(reading.activation().transpose(0, 1), x)
        if separate:
            assert reading.weight is layer.get_parameter(f"{name}_proj_weight")
    if not separate:
        assert torch.equal(torch.cat([r.weight for r in (query, key, value)]), layer.in_proj_weight)
    assert out.weight is layer.out_proj.weight
    with torch.no_grad():
        given = F.linear(out.activation(), out.weight, layer.out_proj.bias)
        assert torch.allclose(given.transpose(0, 1), expected)


def test_other_calls_read_nothing() -> None:
    x, w = numbers(4), numbers(4, seed=1)
    with collecting() as found:
        x * w, torch.dot(x, w), F.linear(x, w), torch.einsum("...i,i->...", x, w)
    assert not found
