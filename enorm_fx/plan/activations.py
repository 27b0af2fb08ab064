"""Which weights read the activations that a group scales.

A group says which weights take a scale and which take it back, and nothing of activations: of the
weights that it divides some read what the others produce (`v_proj`, then `o_proj`), some only meet
it in a product that must not change (`q_proj` with `k_proj`). The dataflow tells them apart: a call
that reads such activations is given a tensor that has the group's scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx
import torch

from enorm_fx.errors import ArgumentError
from enorm_fx.plan.data import PlanData
from enorm_fx.plan.records import Group, ScaledParameter
from enorm_fx.symmetry.solution import ScaleTerm
from enorm_fx.tracing.op_traits import CONTRACTIONS

_ATTENTION = "multi_head_attention_forward"


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """A weight that reads the activations which a group scales.

    group: the group's number in the plan.
    terms: those of the parameter's terms that take the scale back, by their positions; indices
           hold the group's scales alone, -1 in place of any other.
    """

    group: int
    parameter: ScaledParameter
    terms: dict[int, ScaleTerm]


def check_keeps_function(plan: PlanData) -> None:
    """Raises ArgumentError for a plan whose rescalings change what the model computes."""
    if not plan.exact:
        raise ArgumentError(
            "this plan does not keep the function (plan.exact is False): analyze the model "
            "with batchnorm='affine' and without biases='skip'"
        )


def readers_of(plan: PlanData) -> tuple[Reader, ...]:
    """Every weight that reads a group's activations, in execution order.

    A weight that reads those of several groups is listed once for each of them.
    """
    weights = {s.name: s for s in plan.parameters if len(s.shape) > 1}
    divided: dict[str, list[int]] = {name: [] for name in weights}
    for number, group in enumerate(plan.groups):
        for name in group.consumers:
            divided.get(name, []).append(number)
    found: dict[tuple[str, int], Reader] = {}
    for names, carried in _contractions(plan.dataflow):
        for name in names:
            for number in divided.get(name, ()):
                if carried is None or number in carried:
                    terms = _dividing(weights[name], plan.groups[number], inside=carried is None)
                    if terms:
                        found.setdefault((name, number), Reader(number, weights[name], terms))
    return tuple(found.values())


def _contractions(graph: nx.DiGraph) -> Iterator[tuple[tuple[str, ...], set[int] | None]]:
    """Of each contraction the parameters that it reads, and the groups that its activations have.

    None: the call makes activations itself, as attention does for its output projection.
    """
    made: set[int] = set()  # calls on parameters and constants alone
    for node, data in graph.nodes(data=True):
        before = list(graph.predecessors(node))
        if not data["leaf"] and not data["reads"] and made.issuperset(before):
            made.add(node)
        elif data["op"] == _ATTENTION:
            yield data["reads"], None
        elif data["op"] in CONTRACTIONS:
            yield data["reads"], {g for n in before if n not in made for g in _groups(graph, n)}


def _groups(graph: nx.DiGraph, node: int) -> tuple[int, ...]:
    groups: tuple[int, ...] = graph.nodes[node]["groups"]
    return groups


def _dividing(scaled: ScaledParameter, group: Group, inside: bool) -> dict[int, ScaleTerm]:
    """The terms that divide a weight by the group's scales.

    inside: only those that vary along the last axis, which is the one that attention contracts; the
    rows of queries and keys trade scales with each other.
    """
    result = {}
    for position, term in enumerate(scaled.terms):
        own = (term.index >= group.start) & (term.index < group.start + group.channels)
        if term.coefficient < 0 and bool(own.any()) and (not inside or term.index.shape[-1] > 1):
            result[position] = ScaleTerm(term.coefficient, torch.where(own, term.index, -1))
    return result
