"""From the solution of the equations to the plan: groups, pairs, parameters, blocked sides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from enorm_fx.plan.blocked import blocked_sides
from enorm_fx.plan.data import Group, Pair, PlanData, ScaledParameter
from enorm_fx.plan.graph import dataflow, depths, paths, readers, shown
from enorm_fx.rules import Labels
from enorm_fx.symmetry.basis import Basis, build_basis
from enorm_fx.symmetry.labels import Label, LabelTerm
from enorm_fx.symmetry.solution import ScaleTerm, Solution
from enorm_fx.tracing.trace import PARAMETER, Node, Trace

_NORMALIZATIONS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")


def describe(
    model: nn.Module,
    traced: Trace,
    labels: Labels,
    solution: Solution,
    *,
    batchnorm: str,
    biases: str,
) -> PlanData:
    """Say in a plan what the solution of a model's equations means."""
    names = _weights(traced, labels.parameters, batchnorm)
    free = {name: solution.terms(label.terms) for name, label in labels.parameters.items()}
    basis = build_basis(labels.system.size, free, _read_now(traced))
    graph = dataflow(traced)
    depth, last = depths(graph, names)
    parameters = tuple(
        ScaledParameter(
            name=name,
            shape=label.shape,
            terms=_renumbered(free[name], basis),
            counted=name in names or biases == "balance",
            depth=depth.get(name, 1),
            last=name in last,
            aliases=traced.aliases.get(name, ()),
        )
        for name, label in labels.parameters.items()
    )
    groups, pairs = _describe(traced, labels, solution, basis, graph, free, names)
    return PlanData(
        model=model,
        parameters=parameters,
        groups=groups,
        pairs=pairs,
        blocked=blocked_sides(traced, labels, solution, names),
        num_scales=sum(basis.groups),
        exact=not _any_free(solution, basis, labels.ignored),
        graph=shown(graph, traced),
        tracer=traced.front_end,
        inputs=traced.inputs,
        notes=traced.notes,
    )


def _weights(trace: Trace, parameters: Iterable[str], batchnorm: str) -> dict[str, Node]:
    """What counts as a weight: two axes or more, or the gamma of a normalization layer."""
    result: dict[str, Node] = {}
    wanted = set(parameters)
    for node in trace.nodes:
        if node.op == PARAMETER:
            if node.name in wanted and len(node.out.shape) >= 2:
                result[node.name] = node
        elif node.op in _NORMALIZATIONS and not (node.op == "batch_norm" and batchnorm == "skip"):
            gamma = next((n for n in node.inputs() if n.op == PARAMETER), None)
            if gamma is not None and gamma.name in wanted:
                result[gamma.name] = gamma
    return result


def _read_now(trace: Trace) -> set[str]:
    """Parameters that are read in the mode that the model is in."""
    return {node.name for node in trace.nodes[: trace.shown] if node.op == PARAMETER}


def _renumbered(terms: tuple[ScaleTerm, ...], basis: Basis) -> tuple[ScaleTerm, ...]:
    result = []
    for term in terms:
        index = torch.where(term.index >= 0, basis.index[term.index], -1)
        if bool((index >= 0).any()):
            result.append(ScaleTerm(term.coefficient, index))
    return tuple(result)


def _any_free(solution: Solution, basis: Basis, ignored: list[tuple[LabelTerm, ...]]) -> bool:
    return any(
        bool((basis.index[term.index[term.index >= 0]] >= 0).any())
        for terms in ignored
        for term in solution.terms(terms)
    )


def _describe(
    trace: Trace,
    labels: Labels,
    solution: Solution,
    basis: Basis,
    graph: Any,
    free: dict[str, tuple[ScaleTerm, ...]],
    weights: dict[str, Node],
) -> tuple[tuple[Group, ...], tuple[Pair, ...]]:
    """Groups and pairs in execution order, with the ops that lie between."""
    starts = torch.tensor([0, *basis.groups]).cumsum(0)
    sizes = torch.tensor(basis.groups, dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(basis.groups)), sizes)
    group_of = torch.where(basis.index >= 0, owner[basis.index], -1) if len(owner) else basis.index
    sides = _sides(free, group_of)
    carrying = _carrying(labels, solution, group_of, len(basis.groups))
    for node, data in graph.nodes(data=True):
        data["groups"] = tuple(g for g, nodes in enumerate(carrying) if node in nodes)
    reading = readers(graph)
    groups, pairs = [], []
    for g, channels in enumerate(basis.groups):
        producers = [n for n in sides if 1 in sides[n].get(g, ())]
        consumers = [n for n in sides if -1 in sides[n].get(g, ())]
        producers = [n for n in producers if n in weights] or producers
        consumers = [n for n in consumers if n in weights] or consumers
        ends = {node: name for name in consumers for node in reading.get(name, ())}
        ops: dict[str, None] = {}
        for producer in producers:
            found = paths(graph, carrying[g], reading.get(producer, []), ends)
            within = [ends[node] for node in reading.get(producer, ()) if node in ends]
            found.update((consumer, ()) for consumer in within if consumer not in found)
            for consumer, via in found.items():
                pairs.append((reading[producer][0], Pair(producer, consumer, channels, via)))
                ops.update(dict.fromkeys(via))
        group = Group(channels, tuple(producers), tuple(consumers), tuple(ops), int(starts[g]))
        groups.append(group)
    pairs.sort(key=lambda item: item[0])
    return tuple(groups), tuple(pair for _, pair in pairs)


def _sides(
    free: dict[str, tuple[ScaleTerm, ...]], group_of: Tensor
) -> dict[str, dict[int, set[int]]]:
    """Parameter -> group -> signs of the coefficients with which the group moves it."""
    result: dict[str, dict[int, set[int]]] = {}
    for name, terms in free.items():
        for term in terms:
            for g in group_of[term.index[term.index >= 0]].unique().tolist():
                if g >= 0:
                    sign = 1 if term.coefficient > 0 else -1
                    result.setdefault(name, {}).setdefault(g, set()).add(sign)
    return result


def _carrying(labels: Labels, solution: Solution, group_of: Tensor, count: int) -> list[set[int]]:
    """For each group the nodes whose result it scales."""
    none = count  # an extra slot for variables in no group
    of_root = torch.where(group_of < 0, none, group_of)
    of_variable = torch.where(solution.root < 0, none, of_root[solution.root])
    several = {
        root: {int(of_root[free]) for _, free in parts} for root, parts in solution.sums.items()
    }
    is_sum = torch.zeros(len(solution.root), dtype=torch.bool)
    is_sum[list(several)] = True
    result: list[set[int]] = [set() for _ in range(count + 1)]
    for index, value in enumerate(labels.values):
        for label in value if isinstance(value, tuple) else (value,):
            if isinstance(label, Label):
                for term in label.terms:
                    met = torch.zeros(count + 1, dtype=torch.bool)
                    met[of_variable[term.ids.reshape(-1)]] = True
                    for g in met.nonzero().squeeze(1).tolist():
                        result[g].add(index)
                    if several:
                        roots = solution.root[term.ids.reshape(-1)]
                        for root in roots[is_sum[roots] & (roots >= 0)].unique().tolist():
                            for g in several[root]:
                                result[g].add(index)
    return result[:count]
