"""What a fused step counts is what torch would count, whichever parameters have a gradient."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enorm_fx import ENorm
from enorm_fx.step.fused.counts import Counts
from enorm_fx.step.fused.native import _is_plain_number
from tests.support.helpers import BACKENDS


class Slow:
    """The same, one parameter at a time."""

    def __init__(self, group_of: list[int], next_: list[float]) -> None:
        self.group_of, self.next = group_of, next_

    def steps(self, gradients: list[int | None]) -> list[tuple[int, float] | None]:
        """Group and number of the step of each parameter; None: it makes none."""
        each = zip(gradients, self.group_of, self.next, strict=True)
        return [None if g is None else (group, count) for g, group, count in each]

    def advance_(self, gradients: list[int | None]) -> None:
        pairs = zip(self.next, gradients, strict=True)
        self.next = [count + (g is not None) for count, g in pairs]


def told(counts: Counts, gradients: list[int | None]) -> list[tuple[int, float] | None]:
    numbers, rows = counts.rows(gradients)
    assert len(rows) == len(set(rows))
    pairs = zip(numbers, gradients, strict=True)
    return [None if gradient is None else rows[number] for number, gradient in pairs]


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_each_parameter(seed: int) -> None:
    draw = random.Random(seed)
    size = draw.randint(1, 6)
    group_of = [draw.randint(0, 2) for _ in range(size)]
    next_ = [float(draw.randint(1, 3)) for _ in range(size)]
    counters = [torch.tensor(n - 1) if draw.random() < 0.8 else None for n in next_]
    there = [c for c in counters if c is not None]
    counts = Counts(group_of, counters, partial(torch._foreach_add_, there, 1))
    counts.found_(next_)
    slow = Slow(group_of, next_)
    for _ in range(12):
        some = draw.random() < 0.5
        gradients = [None if some and draw.random() < 0.4 else draw.randint(1, 9) for _ in next_]
        assert told(counts, gradients) == slow.steps(gradients)
        before = sum(c._version for c in there)
        written = counts.advance_(gradients)
        slow.advance_(gradients)
        assert sum(c._version for c in there) == before + written
        pairs = zip(counters, slow.next, strict=True)
        assert all(c is None or float(c) == count - 1 for c, count in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_are_counted_in_the_optimizer_and_noticed(backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    ENorm(model, optimizer, backend=backend, start="as_is", fused=True)
    parameters = list(model.parameters())
    expected = [0.0] * len(parameters)
    for turn in range(6):
        for number, p in enumerate(parameters):
            p.grad = None if turn in (3, 4) and number == 1 else torch.randn_like(p)
            expected[number] += p.grad is not None
        versions = [s["step"]._version for s in optimizer.state.values()]
        optimizer.step()
        assert [float(optimizer.state[p]["step"]) for p in parameters] == expected
        if turn:
            made = [s["step"]._version for s in optimizer.state.values()]
            moved = [now - then for now, then in zip(made, versions, strict=True)]
            assert moved == [int(p.grad is not None) for p in parameters]


@pytest.mark.parametrize("change", ["parameter", "buffer", "counter"])
def test_what_others_write_between_two_steps_is_noticed(change: str) -> None:
    """The next step is that of torch operations, which remember nothing."""
    ends = []
    for backend in BACKENDS:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-30, weight_decay=0.0)
        enorm = ENorm(model, optimizer, backend=backend, start="as_is", fused=True)
        for turn in range(4):
            optimizer.zero_grad()
            model(torch.randn(5, 3).double()).square().mean().backward()
            optimizer.step()
            if turn == 2:
                write_(model, optimizer, change)
        enorm.flush_()
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(ends[0], ends[-1], strict=True))


def write_(model: nn.Module, optimizer: Any, change: str) -> None:
    weight = model.get_parameter("0.weight")
    state = optimizer.state[weight]
    written: Tensor = {
        "parameter": weight, "buffer": state["exp_avg_sq"], "counter": state["step"],
    }[change]  # fmt: skip
    with torch.no_grad():
        written.mul_(3)


def test_only_plain_numbers_are_counted_natively() -> None:
    assert _is_plain_number(torch.tensor(1.0))
    assert _is_plain_number(torch.zeros(5, dtype=torch.float64)[3:4])
    freed = torch.tensor(1.0)
    freed.untyped_storage().resize_(0)
    parameter, sparse = nn.Parameter(torch.tensor(1.0)), torch.tensor([1.0]).to_sparse()
    other = (torch.tensor(1), torch.zeros(2), torch.zeros((), device="meta"), freed, parameter)
    assert not any(map(_is_plain_number, (*other, sparse)))
