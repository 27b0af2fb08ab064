"""Plans: immutable, selectable, and true to what they say."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enorm_fx import analyze, balance
from enorm_fx.model_plan import Plan
from tests.support.laws import ROUNDING, largest_change, log_scale, randomized, with_scales
from tests.support.zoo_small import Net

ROWS = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def plan_of_three() -> Plan:
    """A residual network with groups of 4, 3 and 2 channels."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        y = y + m.c(m.b(y).relu())
        return m.e(m.d(y).relu())

    layers = {"a": (3, 4), "b": (4, 3), "c": (3, 4), "d": (4, 2), "e": (2, 1)}
    return analyze(randomized(Net(run, **{k: nn.Linear(*v) for k, v in layers.items()})), ROWS)


def test_groups_say_who_produces_and_who_consumes() -> None:
    plan = plan_of_three()
    assert [(g.channels, g.start, g.producers, g.consumers) for g in plan.groups] == [
        (4, 0, ("a.weight", "c.weight"), ("b.weight", "d.weight")),
        (3, 4, ("b.weight",), ("c.weight",)),
        (2, 7, ("d.weight",), ("e.weight",)),
    ]
    assert plan.num_scales == 9
    assert plan.groups[0].via == ("relu", "add")


def test_pairs_are_in_execution_order() -> None:
    pairs = [(p.producer[0], p.consumer[0], p.channels) for p in plan_of_three().pairs]
    assert pairs == [
        ("a", "b", 4), ("a", "d", 4), ("b", "c", 3), ("c", "d", 4), ("d", "e", 2)
    ]  # fmt: skip


def test_exponents_of_a_weight_are_output_less_input() -> None:
    plan = plan_of_three()
    u = torch.arange(9.0)
    by_name = {p.name: log_scale(p.terms, p.shape, u) for p in plan.parameters}
    assert by_name["a.weight"].tolist() == [[float(i)] * 3 for i in range(4)]
    assert by_name["b.weight"].tolist() == [[4 + i - j for j in range(4)] for i in range(3)]
    assert by_name["b.bias"].tolist() == [4, 5, 6]
    assert by_name["e.weight"].tolist() == [[-7, -8]]
    assert not by_name["e.bias"].any()


def test_a_selection_keeps_its_groups_and_the_function() -> None:
    plan = plan_of_three()
    part = plan.select(lambda group: group.channels != 3)
    assert [(g.channels, g.start) for g in part.groups] == [(4, 0), (2, 4)]
    assert part.num_scales == 6
    assert largest_change(part, (ROWS,)) < ROUNDING
    assert {(p.producer, p.consumer) for p in part.pairs} == {
        (p.producer, p.consumer) for p in plan.pairs if p.channels != 3
    }
    u = torch.randn(6, dtype=torch.float64)
    moved, whole = (
        with_scales(part, u),
        with_scales(plan, torch.cat([u[:4], torch.zeros(3), u[4:]])),
    )
    for one, other in zip(moved.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_selecting_all_or_nothing() -> None:
    plan = plan_of_three()
    whole, none = plan.select(lambda group: True), plan.select(lambda group: False)
    assert whole.groups == plan.groups
    assert whole.num_scales == plan.num_scales
    assert (none.groups, none.pairs, none.num_scales) == ((), (), 0)
    assert not any(p.terms for p in none.parameters)
    assert largest_change(none, (ROWS,)) == 0


def test_selecting_leaves_the_plan_alone() -> None:
    plan = plan_of_three()
    plan.select(lambda group: group.channels == 2)
    assert plan.num_scales == 9
    with pytest.raises(FrozenInstanceError):
        plan.num_scales = 3  # type: ignore[misc]


def test_rescaling_writes_what_the_terms_say() -> None:
    plan = plan_of_three()
    u = torch.randn(9, dtype=torch.float64)
    expected = [p.detach().clone() for p in with_scales(plan, u).parameters()]
    plan.rescale_(u)
    for found, wanted in zip(plan.model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-12, atol=0)


def test_rescaling_there_and_back() -> None:
    plan = plan_of_three()
    before = [p.detach().clone() for p in plan.model.parameters()]
    u = torch.randn(9, dtype=torch.float64)
    plan.rescale_(u)
    assert not torch.allclose(before[0], plan.model.a.weight)
    plan.rescale_(-u)
    for found, wanted in zip(plan.model.parameters(), before, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-12, atol=0)


def test_the_norm_is_that_of_the_counted_weights() -> None:
    plan = plan_of_three()
    weights = [p.detach() for p in plan.model.parameters() if p.ndim == 2]
    assert plan.norm() == pytest.approx(sum(w.square().sum().item() for w in weights))
    assert plan.norm(p=1) == pytest.approx(sum(w.abs().sum().item() for w in weights))
    depth = [1, 2, 3, 4, 5]
    weighted = sum(
        2.0 ** (-2 * d) * w.square().sum().item() for d, w in zip(depth, weights, strict=True)
    )
    assert plan.norm(c=2.0) == pytest.approx(weighted)


def test_the_graph_is_the_dataflow() -> None:
    graph = plan_of_three().graph
    ops = [data["op"] for _, data in graph.nodes(data=True)]
    assert ops == ["input", "linear", "relu", "linear", "relu", "linear", "add", "linear", "relu",
                   "linear"]  # fmt: skip
    assert graph.in_degree(list(graph)[6]) == 2
    assert graph.nodes[list(graph)[1]]["parameters"] == ("a.weight", "a.bias")


def test_the_reason_is_the_nearest_call_that_keeps_values() -> None:
    """The norm keeps what it makes, too; that is farther from the gate and from the last layer."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.norm(m.a(x))
        return m.down(F.silu(m.gate(y)) * m.up(y))

    layers = {"a": (3, 4), "gate": (4, 5), "up": (4, 5), "down": (5, 2)}
    linear = {k: nn.Linear(*v, bias=False) for k, v in layers.items()}
    plan = analyze(randomized(Net(run, norm=nn.RMSNorm(4, eps=1e-5), **linear)), ROWS)
    reasons = {b.weight: b.reason for b in plan.blocked if b.side == "output"}
    assert reasons["gate.weight"] == "'silu' does not scale with its input"
    assert reasons["down.weight"] == "output of the model"
    assert "up.weight" not in reasons


class WrittenOut(nn.Module):
    """RMSNorm in torch's own operations, as transformers write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        normalized = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight.to(x.dtype)[None] * normalized


@pytest.mark.parametrize("norm", [nn.RMSNorm, WrittenOut])
def test_a_gamma_counts_however_the_norm_is_written(norm: type[nn.Module]) -> None:
    """So its group has a minimum, and all rescalings are balanced to the same weights."""
    model = randomized(nn.Sequential(nn.Linear(3, 4), norm(4), nn.Linear(4, 2)))
    plan = analyze(model, ROWS)
    assert {p.name for p in plan.parameters if p.counted} == {"0.weight", "1.weight", "2.weight"}
    balance(plan)
    once = [p.detach().clone() for p in model.parameters()]
    plan.rescale_(torch.randn(plan.num_scales, dtype=torch.float64))
    balance(plan)
    assert all(
        torch.allclose(a, b, rtol=1e-12) for a, b in zip(model.parameters(), once, strict=True)
    )
    assert not torch.allclose(model[1].weight, torch.ones(4, dtype=torch.float64))
