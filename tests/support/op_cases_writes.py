"""Calls that write into a tensor, or give a copy of it into which something is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.support.op_cases import OpCase, x

aten = torch.ops.aten
KEPT = "what is written over keeps its label"
PICKED = "any slice may be written to"
ROWS = torch.tensor([1, 0, 1])
PLACES = torch.tensor([[1, 0], [1, 1]])


def items() -> Iterator[OpCase]:
    yield OpCase("x[0] = 0", _set(0, 0), (x(3, 2),), "zeros are written")
    yield OpCase("x[0] = 1", _set(0, 1.0), (x(3, 2),), KEPT, 4)
    yield OpCase("x[:, 1] = y", _set((slice(None), 1)), (x(3, 2), x(3)), KEPT, 6)
    yield OpCase("x[1:] = y", _set(slice(1, None)), (x(3, 2), x(2)), "rows share a scale")
    yield OpCase("x[..., [1, 0]] = y", _set((..., [1, 0])), (x(2, 2), x(2, 2)), KEPT, 4)
    rows, entries = torch.tensor([True, False]), torch.tensor([[True, False, True], [False] * 3])
    given = "the mask is an input"
    yield OpCase("x[rows] = 0", _set_masked, (x(2, 3), rows), given, 3)
    yield OpCase("x[entries] = 0", _set_masked, (x(2, 3), entries), given)
    yield OpCase("x[rows] = y", _set_masked, (x(2, 3), rows, x(3)), given, 3)
    yield OpCase("x[entries] = number", _set_masked, (x(2, 3, 2), entries, x()), given)
    yield OpCase("x[entries] = y", _set_masked, (x(2, 3, 2), entries, x(2)), given)
    yield OpCase("x[entries, :2] = y", _set_masked_part, (x(2, 3, 2), entries, x(2)), given)
    yield OpCase("zeros[:, 1:] = y", _fill_zeros, (x(2, 2),))
    yield OpCase("zeros[0] = 1 is added", lambda a: a + _one_hot(), (x(2, 3),), "constant in part")
    yield OpCase("view of zeros that are written is added", _late_write, (x(2, 3),))
    yield OpCase("x.copy_", lambda a, b: (a * 1).copy_(b), (x(2, 3), x(3)), KEPT)
    yield OpCase("x.zero_", lambda a: (a * 1).zero_(), (x(2, 3),))
    yield OpCase("zeroed in part", _zeroed, (x(2, 3),))
    yield OpCase("zeros filled by two", _filled_by_two, (x(2, 1), x(2, 2)))
    yield OpCase("zeros that are added to", _added_to, (x(2, 3), x(2, 3)))
    yield OpCase("many zeros filled", _fill_many, (x(2, 3),), "a variable for each axis", 4)
    yield OpCase("x[0] = y, whole numbers", _fill_whole, (x(2, 3),), "rounded", 0)


def multiplications() -> Iterator[OpCase]:
    yield OpCase("(x + 0) *= y", lambda a, b: (a * 1).mul_(b), (x(2, 3), x(3)))
    yield OpCase("(x + 0) *= y, read before", _multiplied(False), (x(2, 3), x(3)))
    yield OpCase("(x + 0) *= y, read elsewhere", _multiplied(True), (x(2, 3), x(3)), KEPT, 6)
    yield OpCase("x[0] *= y", _part_multiplied, (x(2, 3), x(3)), KEPT, 6)
    yield OpCase("zeroed by a number, then added to", _zeroed_by_a_number, (x(2), x(2)), KEPT, 2)


def by_index() -> Iterator[OpCase]:
    for name in ("index_add", "index_copy"):
        slack = KEPT if name == "index_copy" else ""
        for dim, source in ((0, (3, 2)), (1, (2, 3)), (-1, (2, 3))):
            yield from _three_ways(name, dim, ROWS, x(2, 2), x(*source), slack)
        given = (x(2, 2), x(3, 2), ROWS)
        yield OpCase(f"{name} by an input", _by_an_input(name), given, PICKED, 2)
        yield OpCase(f"{name} to zeros by an input", _into_zeros(name), given[1:], PICKED, 2)
    for name in ("scatter", "scatter_add"):
        slack = KEPT if name == "scatter" else ""
        for dim in (0, 1):
            yield from _three_ways(name, dim, PLACES, x(2, 2), x(2, 2), slack)
            yield from _three_ways(name, dim, PLACES, x(3, 3), x(2, 4), slack)
        given = (x(2, 2), x(2, 2), PLACES)
        yield OpCase(f"{name} by an input", _by_an_input(name), given, PICKED, 2)
        yield OpCase(f"{name} to zeros by an input", _into_zeros(name), given[1:], PICKED, 2)
    for how in ("sum", "mean", "amax", "prod"):
        yield OpCase(
            f"scatter_reduce by {how}",
            lambda a, b, how=how: a.scatter_reduce(1, PLACES, b, how),
            (x(2, 2), x(2, 2)),
            "factors" if how == "prod" else "",
        )
    yield OpCase("scatter(0)", lambda a: a.scatter(1, PLACES, 0), (x(2, 2),), KEPT)
    yield OpCase("scatter(1)", lambda a: a.scatter(1, PLACES, value=1.0), (x(2, 2),), KEPT)
    yield OpCase(
        "scatter, multiplied", lambda a: a.scatter(1, PLACES, 2.0, reduce="multiply"), (x(2, 2),),
        "no rule",
    )  # fmt: skip
    yield OpCase(
        "index_add, weighed", lambda a, b: a.index_add(0, ROWS, b, alpha=2), (x(2, 2), x(3, 2))
    )


def copies() -> Iterator[OpCase]:
    picked = [ROWS[:2], None]
    for add in (False, True):
        yield OpCase(
            f"aten.index_put({add})",
            lambda a, b, add=add: aten.index_put.default(a, picked, b, add),
            (x(2, 3), x(2, 3)),
            "" if add else KEPT,
        )
    yield OpCase(
        "x.index_put_ to zeros",
        lambda b: b.new_zeros(2, 3).index_put_((ROWS[:2],), b, accumulate=True),
        (x(2, 3),),
    )
    yield OpCase(
        "slice_scatter", lambda a, b: a.slice_scatter(b, 1, 0, 3, 2), (x(2, 3), x(2, 2)), KEPT
    )
    yield OpCase("slice_scatter to zeros", _slices_scattered, (x(2, 2), x(2, 1)))
    yield OpCase("select_scatter", lambda a, b: a.select_scatter(b, 1, -1), (x(2, 3), x(2)), KEPT)
    yield OpCase(
        "select_scatter to zeros",
        lambda b: torch.zeros(2, 3, dtype=b.dtype).select_scatter(b, 0, 1),
        (x(3),),
    )


def _three_ways(
    name: str, dim: int, index: Tensor, a: Tensor, b: Tensor, slack: str
) -> Iterator[OpCase]:
    """As a function, in place, and as a function of zeros and in place there."""
    shown = f"({dim}, {tuple(b.shape)})"
    function, method = getattr(torch, name), getattr(Tensor, f"{name}_")
    yield OpCase(f"torch.{name}{shown}", lambda a, b: function(a, dim, index, b), (a, b), slack)
    yield OpCase(f"Tensor.{name}_{shown}", lambda a, b: method(a * 1, dim, index, b), (a, b), slack)
    yield OpCase(
        f"torch.{name}{shown} to zeros",
        lambda b: function(b.new_zeros(a.shape), dim, index, b), (b,), slack,
    )  # fmt: skip
    yield OpCase(
        f"Tensor.{name}_{shown} to zeros",
        lambda b: method(b.new_zeros(a.shape), dim, index, b), (b,), slack,
    )  # fmt: skip


def _by_an_input(name: str) -> Callable[..., Tensor]:
    return lambda a, b, i: getattr(a, name)(0, i, b)


def _into_zeros(name: str) -> Callable[..., Tensor]:
    return lambda b, i: getattr(b.new_zeros(2, 2), f"{name}_")(0, i, b)


def _filled_by_two(a: Tensor, b: Tensor) -> Tensor:
    c = a.new_zeros(2, 3)
    c[:, :1], c[:, 1:] = a, b
    return c


def _added_to(a: Tensor, b: Tensor) -> Tensor:
    c = torch.zeros_like(a)
    c += a
    c += b
    return c


def _fill_many(a: Tensor) -> Tensor:
    c = a.new_zeros(300, 300)
    c[:2, :3] = a
    return c[:2, :3]


def _fill_whole(a: Tensor) -> Tensor:
    c = torch.zeros(2, 3, dtype=torch.int64)
    c[:] = a
    return c.double()


def _multiplied(elsewhere: bool) -> Callable[..., Any]:
    def run(a: Tensor, b: Tensor) -> Any:
        c = a * 1
        view = c[:]
        before = view.relu()
        c.mul_(b)
        return (c, view) if elsewhere else (c, before)

    return run


def _part_multiplied(a: Tensor, b: Tensor) -> Tensor:
    c = a * 1
    c[0].mul_(b)
    return c


def _zeroed_by_a_number(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    c = a * 1
    d = c.mul_(0)
    d.add_(b)
    return c, d


def _slices_scattered(a: Tensor, b: Tensor) -> Tensor:
    c = a.new_zeros(2, 3)
    return c.slice_scatter(a, 1, 0, 2).slice_scatter(b, 1, 2, 3)


def _zeroed(a: Tensor) -> Tensor:
    b = a.clone()
    b[0].zero_()
    return b


def _set(index: Any, value: Any = None) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(a: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        b = a * 1.0
        b[index] = rest[0] if rest else value
        return b, b.relu()

    return run


def _set_masked(a: Tensor, mask: Tensor, value: Any = 0) -> Tensor:
    b = a * 1.0
    b[mask] = value
    return b


def _set_masked_part(a: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    b = a * 1.0
    b[mask, :2] = value
    return b


def _fill_zeros(a: Tensor) -> Tensor:
    b = torch.zeros(2, 3, dtype=a.dtype)
    b[:, 1:] = a
    return b


def _one_hot() -> Tensor:
    b = torch.zeros(3, dtype=torch.float64)
    b[0] = 1.0
    return b


def _late_write(a: Tensor) -> Tensor:
    b = torch.zeros(3, dtype=a.dtype)
    c = b[:]
    b.add_(1.0)
    return a.relu() + c


CASES = [*items(), *multiplications(), *by_index(), *copies()]
