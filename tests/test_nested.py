"""Walking nested values: all is found, in order, and put back in the same shape."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from enorm_fx.nested import instances, replaced, tensors_anywhere

Pair = namedtuple("Pair", ["left", "right"])


def numbered(start: int = 0) -> Any:
    """Numbers 0 .. 6 in every kind of container that a call of torch's may have."""
    zero, one, two, three, four, five, six = (torch.tensor(start + i) for i in range(7))
    return (
        zero,
        [one, "text", None],
        {"a": two, "b": (three,)},
        slice(four, None),
        Pair(five, 7),
        six,
    )


def test_instances_are_found_in_order() -> None:
    assert [int(t) for t in instances(Tensor, numbered())] == list(range(7))
    assert list(instances(str, numbered())) == ["text"]


def test_what_is_replaced_keeps_the_shape_of_the_rest() -> None:
    value = replaced(Tensor, numbered(), lambda t: int(t) + 10)
    assert value == (
        10,
        [11, "text", None],
        {"a": 12, "b": (13,)},
        slice(14, None),
        Pair(15, 7),
        16,
    )
    assert type(value[4]) is Pair


def test_nothing_is_changed_where_it_stands() -> None:
    given: list[Any] = [torch.tensor(1), {"a": torch.tensor(2)}]
    replaced(Tensor, given, lambda t: None)
    assert [int(t) for t in instances(Tensor, given)] == [1, 2]


@dataclass
class Record:
    value: Any
    count: int = 3


@pytest.mark.parametrize(
    "holder",
    [
        lambda t: Record([t]),
        lambda t: SimpleNamespace(value={"x": t}),
        lambda t: OrderedDict(x=(t,)),
        lambda t: {t},
        lambda t: [[[[t]]]],
    ],
)
def test_tensors_in_objects_are_found(holder: Any) -> None:
    tensor = torch.ones(2)
    assert [t is tensor for t in tensors_anywhere(holder(tensor))] == [True]


def test_an_object_that_holds_itself_ends() -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    assert list(tensors_anywhere(loop)) == []
