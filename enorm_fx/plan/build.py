"""From the solution of the equations to the plan: groups, pairs, parameters, blocked sides."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

import networkx as nx
import torch
from torch import Tensor, nn

from enorm_fx.plan.blocked import blocked_sides
from enorm_fx.plan.data import PlanData
from enorm_fx.plan.graph import dataflow, depths, ops_between
from enorm_fx.plan.orientation import oriented
from enorm_fx.plan.records import Group, ScaledParameter
from enorm_fx.rules import Labels
from enorm_fx.rules.boxes import Box
from enorm_fx.rules.reach import reached
from enorm_fx.rules.registry import Flow, find
from enorm_fx.symmetry.basis import Basis, build_basis
from enorm_fx.symmetry.labels import Label, LabelTerm, numbers_of
from enorm_fx.symmetry.solution import ScaleTerm, Solution
from enorm_fx.tracing.op_traits import NORMALIZATIONS
from enorm_fx.tracing.trace import PARAMETER, Node, Trace


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
    solution = oriented(solution, labels, traced)
    weights = _weights(traced, labels.parameters, batchnorm)
    free = {name: solution.terms(label.terms) for name, label in labels.parameters.items()}
    reaching = reached(traced)
    counted = [_inside(free[name], reaching[name]) for name in free if name in reaching]
    basis = build_basis(labels.system.size, free, counted)
    group_of = _group_of(basis)
    graph = dataflow(traced, _carried(labels, solution, group_of))
    depth, last = depths(graph, weights)
    counts = labels.parameters if biases == "balance" else weights
    return PlanData(
        model=model,
        parameters=_parameters(labels, traced, free, basis, depth, last, counts),
        groups=_groups(basis, free, group_of, weights, graph),
        blocked=blocked_sides(traced, labels, solution, weights),
        num_scales=sum(basis.groups),
        exact=not _any_free(solution, basis, labels.ignored),
        dataflow=graph,
        shown=traced.shown,
        tracer=traced.front_end,
        inputs=traced.inputs,
        notes=traced.notes,
    )


def _parameters(
    labels: Labels,
    traced: Trace,
    free: dict[str, tuple[ScaleTerm, ...]],
    basis: Basis,
    depth: dict[str, int],
    last: Collection[str],
    counted: Collection[str],
) -> tuple[ScaledParameter, ...]:
    """What is known of each parameter, over the plan's scales."""
    scale_of = torch.cat([basis.index, torch.full((1,), -1)])  # the last entry stands for index -1
    return tuple(
        ScaledParameter(
            name=name,
            shape=label.shape,
            terms=_renumbered(free[name], scale_of),
            counted=name in counted,
            depth=depth.get(name, 1),
            last=name in last,
            aliases=traced.aliases.get(name, ()),
        )
        for name, label in labels.parameters.items()
    )


def _weights(trace: Trace, parameters: Iterable[str], batchnorm: str) -> dict[str, Node]:
    """What counts as a weight: two axes or more, or the gamma of a normalization layer.

    Of a normalization that is written out, as in transformers, gamma is what multiplies channels.
    """
    result: dict[str, Node] = {}
    wanted = set(parameters)
    for node in trace.nodes:
        gammas: Iterable[Node] = ()
        if node.op == PARAMETER:
            gammas = [node] if len(node.out.shape) >= 2 else []
        elif node.op in NORMALIZATIONS and not (node.op == "batch_norm" and batchnorm == "skip"):
            gammas = itertools.islice((n for n in node.inputs() if n.op == PARAMETER), 1)
        elif (entry := find(node.op)) is not None and entry.flow is Flow.PRODUCT:
            gammas = (n for n in map(_as_kept, node.inputs()) if n.op == PARAMETER)
        result |= {n.name: n for n in gammas if n.name in wanted and n.out.shape}
    return result


def _as_kept(node: Node) -> Node:
    """The parameter that a tensor is made of, cast or moved, if it is one."""
    while node.op != PARAMETER and (entry := find(node.op)) is not None:
        inputs = list(node.inputs())
        if entry.flow not in (Flow.MOVES, Flow.PASSES) or len(inputs) != 1:
            break
        node = inputs[0]
    return node


def _inside(terms: tuple[ScaleTerm, ...], box: Box) -> tuple[ScaleTerm, ...]:
    """The terms of the entries in a box alone."""
    if box.whole:
        return terms
    return tuple(ScaleTerm(term.coefficient, box.pick(term.index)) for term in terms)


def _renumbered(terms: tuple[ScaleTerm, ...], scale_of: Tensor) -> tuple[ScaleTerm, ...]:
    """Terms over the solution's variables as terms over the plan's scales."""
    found = (ScaleTerm(term.coefficient, scale_of[term.index]) for term in terms)
    return tuple(term for term in found if term.index.numel() and int(term.index.max()) >= 0)


def _any_free(solution: Solution, basis: Basis, ignored: list[tuple[LabelTerm, ...]]) -> bool:
    """Whether the plan has a scale that something should follow and, by choice, does not."""
    return any(
        bool((basis.index[term.index[term.index >= 0]] >= 0).any())
        for terms in ignored
        for term in solution.terms(terms)
    )


def _group_of(basis: Basis) -> Tensor:
    """(size + 1,) int32: variable -> number of its group, -1 for variables that are no scale.

    The last entry stands for index -1.
    """
    group_of = torch.full((len(basis.index) + 1,), -1, dtype=torch.int32)
    scales = (basis.index >= 0).nonzero().squeeze(1)
    sizes = torch.tensor(basis.groups, dtype=torch.int64)
    owner = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(sizes)
    group_of[scales] = owner[basis.index[scales]]
    return group_of


def _groups(
    basis: Basis,
    free: dict[str, tuple[ScaleTerm, ...]],
    group_of: Tensor,
    weights: Collection[str],
    graph: nx.DiGraph,
) -> tuple[Group, ...]:
    """Groups in execution order, with the ops that lie between their producers and consumers."""
    multiplied: list[dict[str, None]] = [{} for _ in basis.groups]
    divided: list[dict[str, None]] = [{} for _ in basis.groups]
    all_terms = [(name, term) for name, terms in free.items() for term in terms]
    moved_by = numbers_of(group_of, [term.index for _, term in all_terms])
    for (name, term), found in zip(all_terms, moved_by, strict=True):
        side = multiplied if term.coefficient > 0 else divided
        for g in found:
            side[g][name] = None
    producers, consumers = (
        [tuple(n for n in names if n in weights) or tuple(names) for names in side]
        for side in (multiplied, divided)
    )
    ends = [*zip(producers, consumers, strict=True)]
    between = ops_between(graph, ends)
    starts = itertools.accumulate(basis.groups, initial=0)
    return tuple(
        Group(channels, producers, consumers, via, start)
        for channels, (producers, consumers), via, start in zip(
            basis.groups, ends, between, starts, strict=False
        )
    )


def _carried(labels: Labels, solution: Solution, group_of: Tensor) -> dict[int, tuple[int, ...]]:
    """For each node the groups that scale its result."""
    of_variable = group_of[solution.root]
    several = {
        root: {g for _, variable in parts if (g := int(group_of[variable])) >= 0}
        for root, parts in solution.sums.items()
    }
    sums = torch.tensor(sorted(several), dtype=torch.int64)
    with_terms: dict[int, list[LabelTerm]] = {}
    for index, value in enumerate(labels.values):
        values = value if isinstance(value, tuple) else (value,)
        terms = [t for label in values if isinstance(label, Label) for t in label.terms]
        if terms:
            with_terms[index] = terms
    # Most calls pass on the very terms that they are given.
    distinct_terms = {id(t): t for terms in with_terms.values() for t in terms}
    found = numbers_of(of_variable, [t.ids for t in distinct_terms.values()])
    carried = {key: set(groups) for key, groups in zip(distinct_terms, found, strict=True)}
    if several:
        for key, term in distinct_terms.items():
            roots = solution.root[term.ids.reshape(-1)].unique()
            carried[key].update(*(several[r] for r in roots[torch.isin(roots, sums)].tolist()))
    return {
        index: tuple(sorted(set().union(*(carried[id(t)] for t in terms))))
        for index, terms in with_terms.items()
    }
