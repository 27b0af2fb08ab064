"""Pairs: derived when asked for; the direct ones are those between which nothing else lies."""

from __future__ import annotations

from itertools import product

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

from enorm_fx import Plan, analyze
from tests.support.zoo_small import Net


class Block(nn.Module):
    """relu(x + second(relu(first(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


def residual(blocks: int) -> Plan:
    ends = nn.Linear(4, 4), nn.Linear(4, 2)
    model = nn.Sequential(ends[0], nn.ReLU(), *(Block(4) for _ in range(blocks)), ends[1])
    return analyze(model, torch.zeros(1, 4))


def dense(layers: int) -> Plan:
    """Every layer reads the outputs of all layers before it."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        for i in range(layers):
            x = torch.cat([x, getattr(m, f"l{i}")(x).relu()], 1)
        return m.head(x)

    inner = {f"l{i}": nn.Linear(4 + 2 * i, 2) for i in range(layers)}
    ends = {"stem": nn.Linear(3, 4), "head": nn.Linear(4 + 2 * layers, 1)}
    return analyze(Net(run, **ends, **inner), torch.zeros(1, 3))


def gated() -> Plan:
    """The gate reads what it multiplies, as in squeeze and excitation."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return m.c(y * m.gate(y).sigmoid())

    layers = {"a": nn.Linear(3, 4), "gate": nn.Linear(4, 4), "c": nn.Linear(4, 2)}
    return analyze(Net(run, **layers), torch.zeros(1, 3))


def lies_between(plan: Plan, producer: str, consumer: str, group: int) -> bool:
    """By networkx: does a member of the group depend on the one, and the other on it?"""
    graph = plan.dataflow
    reads = nx.get_node_attributes(graph, "reads")
    members = {*plan.groups[group].producers, *plan.groups[group].consumers}
    calls = {name: [n for n in graph if name in reads[n]] for name in members}
    after = set().union(*(nx.descendants(graph, n) for n in calls[producer]))
    before = set().union(*(nx.ancestors(graph, n) for n in calls[consumer]))
    others = {n for name in members - {producer, consumer} for n in calls[name]}
    return bool(after & before & others)


@pytest.mark.parametrize("plan", [residual(5), dense(5)], ids=["residual", "dense"])
def test_direct_pairs_are_those_with_no_member_between(plan: Plan) -> None:
    every = {(p.producer, p.consumer) for p in plan.pairs}
    expected = {
        (one, two)
        for number, group in enumerate(plan.groups)
        for one, two in product(group.producers, group.consumers)
        if (one, two) in every and not lies_between(plan, one, two, number)
    }
    assert {(p.producer, p.consumer) for p in plan.direct_pairs} == expected
    assert set(plan.direct_pairs) < set(plan.pairs)


def test_direct_pairs_grow_as_the_model_does_and_all_pairs_as_its_square() -> None:
    sizes = [(len(p.direct_pairs), len(p.pairs)) for p in map(residual, (4, 8))]
    assert sizes == [(4 + 5, 4 + 5 * 6 // 2), (8 + 9, 8 + 9 * 10 // 2)]
    sizes = [(len(p.direct_pairs), len(p.pairs)) for p in map(dense, (4, 8))]
    assert sizes == [(5, 5 * 6 // 2), (9, 9 * 10 // 2)]


@pytest.mark.parametrize("plan", [residual(3), dense(3), gated()], ids=["res", "dense", "gated"])
def test_every_consumer_that_has_a_pair_has_a_direct_one(plan: Plan) -> None:
    assert {p.consumer for p in plan.direct_pairs} == {p.consumer for p in plan.pairs}


def test_what_a_gate_multiplies_is_a_pair() -> None:
    pairs = {(p.producer, p.consumer): p.via for p in gated().direct_pairs}
    assert pairs["a.weight", "c.weight"] == ("relu", "mul")
    assert pairs["a.weight", "gate.weight"] == ("relu",)


def test_a_transposed_weight_is_read_where_its_transpose_is() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.one).relu() @ self.two.T

    plan = analyze(Transposed(), torch.zeros(1, 3))
    assert [(p.producer, p.consumer, p.via) for p in plan.pairs] == [("one", "two", ("relu",))]
    assert plan.direct_pairs == plan.pairs
    assert {p.name: p.depth for p in plan.parameters} == {"one": 1, "two": 2}


def test_pairs_of_a_selection_are_those_of_its_groups() -> None:
    plan = residual(3)
    part = plan.select(lambda group: len(group.producers) == 1)
    assert part.pairs == part.direct_pairs
    assert {(p.producer, p.consumer) for p in part.pairs} == {
        (f"{i}.first.weight", f"{i}.second.weight") for i in (2, 3, 4)
    }
