"""Code whose calls torch does not show: scripted, compiled, transformed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enorm_fx import analyze
from enorm_fx.errors import TraceError
from tests.support.tracing_kit import ROWS, L, sound, two_layers


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = L(4, 4)
        self.branches = False

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.inner(x)).tanh()
        if self.branches and bool(y.sum() > 0):
            return -y
        return y


def scripted(branches: bool = False) -> nn.Module:
    middle = Middle().double()
    middle.branches = branches
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still in use
        script: nn.Module = torch.jit.script(middle)
    return script


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script: nn.Module = torch.jit.trace(Middle().double(), torch.randn(5, 4).double())
    return script


@pytest.mark.parametrize("script", [scripted, traced])
def test_a_script_is_one_call_that_pins(script: Callable[[], nn.Module]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.b(m.middle(m.a(m.c(x).relu())))

    model = two_layers(run, c=L(3, 3), middle=script())
    forward = model.middle.forward  # type: ignore[union-attr]
    plan = analyze(model, ROWS)
    assert plan.num_scales == 3
    assert any("Script" in b.reason or "Traced" in b.reason for b in plan.blocked)
    assert not [p.name for p in plan.parameters if p.terms and p.name.startswith("middle")]
    assert model.middle.forward == forward
    assert sound(model) == 3


def test_a_script_that_fails_says_so_in_one_line() -> None:
    model = two_layers(lambda m, x: m.b(m.middle(m.a(x))), middle=scripted(branches=True))
    forward = model.middle.forward  # type: ignore[union-attr]
    with pytest.raises(TraceError, match="in module 'middle'") as error:
        analyze(model, ROWS, tracer="symbolic")
    assert "\n" not in str(error.value)
    assert model.middle.forward == forward


@pytest.mark.parametrize("way", ["model", "module", "method", "function"])
def test_compiled_code_is_traced_as_it_was_written(way: str) -> None:
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    def double(x: Tensor) -> Tensor:
        return x.relu() * 2

    fast = torch.compile(double, backend=backend)
    part = torch.compile(nn.ReLU(), backend=backend)

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b({"module": m.part, "function": fast}.get(way, F.relu)(y))

    model = two_layers(run, part=part)
    if way == "method":
        model.a.compile(backend=backend)  # type: ignore[operator, union-attr]
    whole: Any = torch.compile(model, backend=backend) if way == "model" else model
    assert analyze(whole, ROWS).num_scales == 4
    assert calls == []


TRANSFORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "vmap": lambda m, y: torch.vmap(lambda row: row * 2)(y),
    "vmap of a layer": lambda m, y: torch.vmap(lambda row: F.linear(row, m.c.weight))(y),
    "nested vmap": lambda m, y: torch.vmap(torch.vmap(torch.sin))(y),
    "jvp": lambda m, y: torch.func.jvp(m.c, (y,), (y,))[1],
    "grad": lambda m, y: torch.func.grad(lambda z: m.c(z).square().sum())(y),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # within torch itself
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("tracer", ["symbolic", "auto"])
def test_a_transform_is_refused_or_pins(transform: str, tracer: str) -> None:
    change = TRANSFORMS[transform]
    model = two_layers(lambda m, x: m.b(change(m, m.a(m.d(x).relu()))), c=L(4, 4), d=L(3, 3))
    if tracer == "symbolic":
        with pytest.raises(TraceError, match=r"test_hidden_code\.py:\d+: torch.func transforms"):
            analyze(model, ROWS, tracer=tracer)
    else:
        try:
            found = sound(model, tracer=tracer)
        except TraceError as error:
            assert "torch.func transforms" in str(error)  # noqa: PT017
            assert transform == "grad"
        else:
            assert found == 3


def test_a_branch_of_the_graph_pins() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(m.c(x).relu())
        return m.b(torch.cond(x.sum() > 0, lambda z: z.relu(), lambda z: z.tanh(), (y,)))

    assert sound(two_layers(run, c=L(3, 3))) == 3


def test_a_function_that_every_call_defines_anew_is_the_same() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        class Shifted(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, y: Tensor) -> Tensor:
                return y + 1

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return grad

        return m.b(m.a(m.c(x).relu()).relu() + Shifted.apply(torch.zeros(4, dtype=x.dtype)))

    assert sound(two_layers(run, c=L(3, 3))) == 3
