"""What is seen of activations while a model runs over batches."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enorm_fx import analyze
from enorm_fx.calibration.observe import Statistics
from enorm_fx.calibration.run import run_batches
from enorm_fx.errors import ArgumentError
from enorm_fx.model_plan import Plan
from enorm_fx.plan.activations import readers_of
from tests.support.laws import randomized
from tests.support.zoo_kit import Net, parameter

L = nn.Linear


def batches(*shape: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]


def observed(model: nn.Module, data: list[Tensor], norm: float) -> tuple[Plan, Tensor]:
    plan = analyze(model, data[0])
    statistics = Statistics(plan, readers_of(plan), norm)
    assert run_batches(model, data, statistics, "") == len(data)
    return plan, statistics.result()


def hidden(model: Any, data: list[Tensor]) -> Tensor:
    """What `b` reads on all batches, (rows, channels)."""
    with torch.no_grad():
        return torch.cat([model.a(x).relu().flatten(0, -2) for x in data])


SPELLINGS = {
    "module": Net(lambda m, x: m.b(m.a(x).relu()), a=L(3, 5), b=L(5, 2)),
    "function": Net(lambda m, x: F.linear(m.a(x).relu(), m.b), a=L(3, 5), b=parameter(2, 5)),
    "product": Net(lambda m, x: m.a(x).relu() @ m.b, a=L(3, 5), b=parameter(5, 2)),
    "transposed": Net(lambda m, x: m.a(x).relu() @ m.b.t(), a=L(3, 5), b=parameter(2, 5)),
    "slices": Net(
        lambda m, x: sum(F.linear(m.a(x).relu(), w) for w in m.b.chunk(2)),
        a=L(3, 5), b=parameter(4, 5),
    ),
    "one of several": Net(
        lambda m, x: F.linear(m.a(x).relu(), m.b[0]), a=L(3, 5), b=parameter(1, 4, 5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("norm", [1, math.inf])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_layer_is_seen(spelling: str, norm: float) -> None:
    model, data = randomized(SPELLINGS[spelling]), batches(2, 4, 3)
    plan, found = observed(model, data, norm)
    read = hidden(model, data)
    expected = read.amax(0) if math.isinf(norm) else read.mean(0)
    assert plan.num_scales == 5
    assert torch.allclose(found, expected)


def test_channels_that_share_a_scale_share_a_size() -> None:
    model = Net(lambda m, x: m.b(m.a(x).relu().flatten(1)), a=nn.Conv2d(2, 3, 1), b=L(12, 2))
    model, data = randomized(model), batches(4, 2, 2, 2)
    for norm in (1, math.inf):
        _, found = observed(model, data, norm)
        with torch.no_grad():
            read = torch.cat([model.a(x).relu() for x in data]).movedim(1, 0).flatten(1)
        assert torch.allclose(found, read.amax(1) if math.isinf(norm) else read.mean(1))


def test_a_scale_that_several_weights_read_has_the_largest_of_all() -> None:
    model = Net(
        lambda m, x: m.b(m.a(x).relu()) + m.c(2 * m.a(x).relu()[:1]),
        a=L(3, 5),
        b=L(5, 2),
        c=L(5, 2),
    )
    model, data = randomized(model), batches(4, 3)
    _, found = observed(model, data, math.inf)
    once = hidden(model, data).amax(0)
    twice = 2 * hidden(model, [x[:1] for x in data]).amax(0)
    assert torch.allclose(found, torch.maximum(once, twice))


def test_what_is_never_read_is_nan() -> None:
    model = Net(lambda m, x: m.b(m.a(x).relu()) if len(x) else x, a=L(3, 5), b=L(5, 2))
    plan = analyze(randomized(model), batches(4, 3)[0])
    statistics = Statistics(plan, readers_of(plan), math.inf)
    run_batches(plan.model, batches(0, 3), statistics, "")
    assert bool(statistics.result().isnan().all())
    assert not statistics.finite


def test_weights_that_read_infinities_are_known_in_order() -> None:
    model = Net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=L(3, 5), b=L(5, 4), c=L(4, 2))
    data = batches(2, 3)
    plan = analyze(randomized(model), data[0])
    data[1][0, 0] = math.inf
    statistics = Statistics(plan, readers_of(plan), math.inf)
    run_batches(plan.model, data, statistics, "")
    assert {name: bool(good) for name, good in statistics.finite.items()} == {
        "b.weight": False,
        "c.weight": False,
    }


# ---- what a run leaves behind: nothing ----


class Noisy(nn.Module):
    """Draws random numbers, counts its calls in a hook, and fails on the third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.norm = L(3, 5), nn.Dropout(), nn.BatchNorm1d(5)
        self.calls = 0
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.modes.append(self.drop.training)
        if self.calls == 3:
            raise RuntimeError("enough")
        return self.norm(self.drop(self.a(x))) + torch.rand(5)


@pytest.mark.parametrize("count", [2, 5])
def test_modes_hooks_and_random_numbers_are_left_as_they_were(count: int) -> None:
    model = Noisy()
    model.norm.eval()
    plan = analyze(Net(lambda m, x: m.a(x), a=model.a), torch.randn(2, 3))
    statistics = Statistics(plan, readers_of(plan), math.inf)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    random.seed(0)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    data = iter([torch.zeros(2, 3)] * count)
    if count > 2:
        with pytest.raises(ArgumentError, match="on batch 2 the model raised RuntimeError: enough"):
            run_batches(model, data, statistics, "")
    else:
        run_batches(model, data, statistics, "")
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in (model, model.a, model.drop, model.norm)] == [
        True,
        True,
        True,
        False,
    ]
    assert not any(model.modes)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert torch.is_grad_enabled()


def test_an_interrupt_leaves_nothing_either() -> None:
    def interrupted() -> Iterator[Tensor]:
        yield torch.zeros(2, 3)
        raise KeyboardInterrupt

    model = Noisy()
    plan = analyze(Net(lambda m, x: m.a(x), a=model.a), torch.randn(2, 3))
    with pytest.raises(KeyboardInterrupt):
        run_batches(model, interrupted(), Statistics(plan, readers_of(plan), math.inf), "")
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "batch", [torch.zeros(2, 3), (torch.zeros(2, 3),), {"x": torch.zeros(2, 3)}]
)
def test_a_batch_is_what_analyze_takes(batch: Any) -> None:
    model = Noisy()
    plan = analyze(Net(lambda m, x: m.a(x), a=model.a), torch.randn(2, 3))
    assert run_batches(model, [batch], Statistics(plan, readers_of(plan), math.inf), "") == 1


def test_no_batch_and_no_fitting_batch_are_refused() -> None:
    plan = analyze(SPELLINGS["module"], torch.randn(2, 3))
    statistics = Statistics(plan, readers_of(plan), math.inf)
    with pytest.raises(ArgumentError, match="batches is empty"):
        run_batches(plan.model, [], statistics, "")
    with pytest.raises(ArgumentError, match="not list"):
        run_batches(plan.model, [[torch.zeros(2, 3), torch.zeros(2)]], statistics, "")
    with pytest.raises(ArgumentError, match="on batch 0 the model raised RuntimeError"):
        run_batches(plan.model, [torch.zeros(2, 4)], statistics, "")
