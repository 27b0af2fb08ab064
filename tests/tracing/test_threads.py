"""A thread that trains meets nothing of a trace that another one makes, nor do two traces meet."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import enorm_fx
from enorm_fx.tracing import op_keys
from tests.support.tracing_kit import ROWS, L
from tests.support.zoo_small import Net


class Doubled(torch.autograd.Function):
    seen: list[tuple[str, bool]] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Doubled.seen.append((threading.current_thread().name, isinstance(x, FakeTensor)))
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def in_another_thread(work: Callable[[], None]) -> list[BaseException]:
    """Run to the end in a thread called "other"; what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="other")
    thread.start()
    thread.join()
    return raised


def doubling(**modules: nn.Module) -> Net:
    model = Net(lambda m, x: m.b(Doubled.apply(m.a(x).relu())), a=L(3, 4), b=L(4, 2), **modules)
    return model.double()


def test_a_thread_that_trains_meanwhile_meets_no_fake_tensor() -> None:
    trained = doubling()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    before = [p.detach().clone() for p in trained.parameters()]

    def train() -> None:
        trained(ROWS).square().sum().backward()
        optimizer.step()

    raised: list[BaseException] = []

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        raised.extend(in_another_thread(train))
        return m.b(Doubled.apply(y))

    Doubled.seen.clear()
    plan = enorm_fx.analyze(Net(run, a=L(3, 4), b=L(4, 2)).double(), ROWS)
    assert raised == []
    assert {fake for name, fake in Doubled.seen if name == "other"} == {False}
    assert {fake for name, fake in Doubled.seen if name != "other"} == {True}
    assert not any(torch.equal(p, q) for p, q in zip(trained.parameters(), before, strict=True))
    assert any("Doubled" in b.reason for b in plan.blocked)


@pytest.mark.parametrize("inner_first", [True, False])
def test_two_threads_trace_at_once(inner_first: bool) -> None:
    """One trace begins and ends within the other, or begins within it and ends after it."""
    plans: dict[str, Any] = {}
    begun, go_on = threading.Event(), threading.Event()

    def slow(m: Any, x: Tensor) -> Tensor:
        begun.set()
        assert go_on.wait(30)
        return m.b(Doubled.apply(m.a(x).relu()))

    def analyze_slowly() -> None:
        plans["slow"] = enorm_fx.analyze(Net(slow, a=L(3, 4), b=L(4, 2)).double(), ROWS)

    def outer(m: Any, x: Tensor) -> Tensor:
        if not thread.is_alive() and not begun.is_set():
            thread.start()
            assert begun.wait(30)
        if inner_first:
            go_on.set()
            thread.join()
        return m.b(Doubled.apply(m.a(x).relu()))

    original = torch.autograd.Function.__dict__["apply"]
    thread = threading.Thread(target=analyze_slowly)
    plans["outer"] = enorm_fx.analyze(Net(outer, a=L(3, 4), b=L(4, 2)).double(), ROWS)
    go_on.set()
    thread.join()
    for plan in plans.values():
        assert plan.num_scales == 0
        assert any("Doubled" in b.reason and b.weight == "a.weight" for b in plan.blocked)
    assert len(plans) == 2
    assert torch.autograd.Function.__dict__["apply"] is original
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_op_keys_are_whole_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread stops in the middle of making the table; another asks meanwhile."""
    op_keys._table.cache_clear()
    original, answers = op_keys._neutral, []

    def slowly(name: str) -> tuple[str, bool]:
        if not answers and name == "relu" and threading.current_thread().name != "other":
            answers.append(None)
            raised = in_another_thread(lambda: answers.append(op_keys.op_key(torch.tanh)))
            assert raised == []
        return original(name)

    monkeypatch.setattr(op_keys, "_neutral", slowly)
    assert op_keys.op_key(torch.relu) == ("relu", False)
    assert answers == [None, ("tanh", False)]
