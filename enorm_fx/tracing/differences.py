"""Where two runs of one model part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from enorm_fx.tracing.op_traits import ANY_NUMBER, TRAINING_ARGUMENTS
from enorm_fx.tracing.trace import CONSTANT, Node, Trace


@dataclass(frozen=True, slots=True)
class Difference:
    """What each of two runs does where they part: "'op' at file:line"."""

    first: str
    second: str


END = "the end of the run"


def shown(op: str, source: str) -> str:
    """A call, for messages."""
    return f"'{op}' at {source or 'an unknown line'}"


def same_call(
    op: str,
    one: tuple[tuple[Any, ...], dict[str, Any]],
    two: tuple[tuple[Any, ...], dict[str, Any]],
    same: Callable[[Any, Any], bool],
) -> bool:
    """Whether two calls of an op mean the same to every rule.

    one, two: (args, kwargs); same: decides for two tensors or nodes.
    """
    skipped = TRAINING_ARGUMENTS.get(op, ())
    any_number = op in ANY_NUMBER
    (args, kwargs), (other_args, other_kwargs) = one, two
    return (
        kwargs.keys() == other_kwargs.keys()
        and _alike(args, other_args, same, any_number)
        and all(
            key in skipped or _alike(value, other_kwargs[key], same, any_number)
            for key, value in kwargs.items()
        )
    )


def _alike(one: Any, two: Any, same: Callable[[Any, Any], bool], any_number: bool) -> bool:
    if one is two:
        return True
    if isinstance(one, (Tensor, Node)) and isinstance(two, (Tensor, Node)):
        return same(one, two)
    if type(one) is not type(two):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(two) and all(
            _alike(a, b, same, any_number) for a, b in zip(one, two, strict=True)
        )
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(
            _alike(one[key], two[key], same, any_number) for key in one
        )
    if isinstance(one, slice):
        return _alike(_ends(one), _ends(two), same, False)
    if isinstance(one, (int, float, complex)) and not isinstance(one, bool):
        scales = any_number and one != 0 and two != 0
        return scales or bool(one == two) or bool(one != one and two != two)
    if isinstance(one, (bool, str, bytes, torch.dtype, torch.device, torch.layout)):
        return bool(one == two)
    code = getattr(one, "__code__", None)  # an object that no rule looks into, or a function
    return code is None or code is getattr(two, "__code__", None)


def _ends(part: slice) -> tuple[Any, Any, Any]:
    return part.start, part.stop, part.step


def first_difference(one: Trace, two: Trace) -> Difference | None:
    """The first call of two traces that is not the same."""
    for first, second in zip(one.nodes, two.nodes, strict=False):
        if not _same_node(first, second, one, two):
            return Difference(shown(first.op, first.source), shown(second.op, second.source))
    if len(one.nodes) != len(two.nodes):
        shorter = min(len(one.nodes), len(two.nodes))
        first_end, second_end = (
            shown(t.nodes[shorter].op, t.nodes[shorter].source) if len(t.nodes) > shorter else END
            for t in (one, two)
        )
        return Difference(first_end, second_end)
    return other_outputs({n.index for n, _ in one.outputs}, {n.index for n, _ in two.outputs})


def other_outputs(one: set[int], two: set[int]) -> Difference | None:
    """Tensors that leave the model in one run and not in another."""
    return None if one == two else Difference("some outputs", "others")


def _same_node(first: Node, second: Node, one: Trace, two: Trace) -> bool:
    if first.op != second.op or (not first.args and first.name != second.name):
        return False
    if first.op == CONSTANT:
        return first.out == second.out and same_values(one.value(first), two.value(second))
    return same_call(
        first.op,
        (first.args, first.kwargs),
        (second.args, second.kwargs),
        lambda a, b: a.index == b.index,
    )


def same_values(one: Tensor | None, two: Tensor | None) -> bool:
    """Whether two constants hold the same; those without known values are what they are."""
    if one is None or two is None:
        return one is two
    same_kind = one.shape == two.shape and one.dtype == two.dtype and one.device == two.device
    return same_kind and (one.is_meta or torch.equal(one, two))
