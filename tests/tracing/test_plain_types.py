"""Code that looks at the very class of a tensor goes the way that it goes on real ones."""

from __future__ import annotations

import builtins
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from enorm_fx import analyze
from enorm_fx.tracing.plain_types import plain_types
from tests.support.tracing_kit import ROWS, sound, two_layers


def is_plain(y: Any) -> bool:
    return type(y) is torch.Tensor


QUESTIONS: dict[str, Callable[[Any], bool]] = {
    "is": is_plain,
    "==": lambda y: type(y) == Tensor,  # noqa: E721
    "in": lambda y: type(y) in (list, Tensor),
    "name": lambda y: type(y).__name__ == "Tensor",
    "table": lambda y: {Tensor: True}.get(type(y), False),
    "kept": lambda y: [kind := type(y), kind is Tensor][1],
}


@pytest.mark.parametrize("tracer", ["symbolic", "export"])
@pytest.mark.parametrize("asked", QUESTIONS)
def test_the_class_of_a_tensor_is_what_it_is_on_real_ones(asked: str, tracer: str) -> None:
    """On real tensors tanh runs, which pins; without it the plan would scale three units."""
    question = QUESTIONS[asked]

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y.tanh() if question(y) else y.relu())

    model = two_layers(run)
    assert analyze(model, ROWS, tracer=tracer).num_scales == 0
    assert sound(model) == 0


def test_parameters_are_parameters() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y.tanh() if type(m.a.weight) is nn.Parameter else y.relu())

    assert analyze(two_layers(run), ROWS).num_scales == 0


def test_type_is_otherwise_what_it_was() -> None:
    names: dict[str, Any] = {"torch": torch}
    exec(
        "def checks():\n"
        "    class Meta(type): pass\n"
        "    class Made(metaclass=Meta): pass\n"
        "    return [isinstance(int, type), issubclass(Meta, type), type(3) is int,\n"
        "            not isinstance(3, type), type('A', (int,), {})(4) == 4,\n"
        "            type(Made) is Meta, isinstance(Made, type), Meta.__mro__[1] is type(int),\n"
        "            type(int) == type, type.mro(int) == int.mro(), 'int' in str(type[int]),\n"
        "            isinstance(int, type | None), Made.__name__ in {type: 'Made'}[type(int)]]\n",
        names,
    )
    module = ModuleType("about_tensors")
    module.__dict__.update(names)
    checks = type(is_plain)(names["checks"].__code__, module.__dict__)
    assert all(checks())
    sys.modules["about_tensors"] = module
    try:
        with plain_types(nn.Linear(1, 1)):
            assert "type" in module.__dict__
            assert all(checks())
        assert "type" not in module.__dict__
    finally:
        del sys.modules["about_tensors"]


def test_other_threads_see_the_very_class_and_nothing_stays() -> None:
    with FakeTensorMode():
        fake = torch.empty(2)
    seen: dict[str, bool] = {}

    def look() -> None:
        seen["other thread"] = is_plain(fake)

    assert not is_plain(fake)
    with plain_types(nn.Linear(1, 1)):
        assert is_plain(fake)
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        with plain_types(nn.Linear(1, 1)):
            assert is_plain(fake)
        assert is_plain(fake)
    assert seen == {"other thread": False}
    assert not is_plain(fake)
    assert is_plain.__globals__.get("type", builtins.type) is builtins.type
