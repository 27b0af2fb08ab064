"""`analyze`: trace a model, run the rules, solve, and say what was found."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from enorm_fx.basis import Basis, build_basis
from enorm_fx.errors import ArgumentError
from enorm_fx.explain import causes
from enorm_fx.graph import dataflow, depths, paths, readers, shown
from enorm_fx.labels import Label, LabelTerm
from enorm_fx.plan import Blocked, Group, Pair, Plan, ScaledParameter, Term
from enorm_fx.rules import Labels, Origin, Rule, propagate
from enorm_fx.solve import Solution, solve
from enorm_fx.tracing import Node, Trace, trace
from enorm_fx.tracing.keys import module_key
from enorm_fx.tracing.modes import trace_both
from enorm_fx.tracing.trace import PARAMETER

_CHOICES = {
    "batchnorm": ("skip", "affine"),
    "biases": ("rescale", "skip", "balance"),
    "frozen": ("pin", "rescale"),
    "tracer": ("auto", "symbolic", "export"),
}
_NORMALIZATIONS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")


def analyze(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    batchnorm: str = "skip",
    biases: str = "rescale",
    frozen: str = "pin",
    rules: Mapping[type[nn.Module], Rule] | None = None,
    tracer: str = "auto",
) -> Plan:
    """Find every rescaling of the model's weights that keeps its function.

    The model is traced in the mode (training or evaluation) that it is in, and in the other one too
    if its code asks for the mode, so that the plan holds in both. It is left as it was; no
    activation is computed, so it may live on the meta device.

    Args:
        model: any module that can be traced.
        example_inputs: None (shapes are inferred from the first layers), a tensor, a tuple of
            positional inputs or a dict of keyword inputs. Only shapes and types matter.
        batchnorm: "skip" looks through BatchNorm, whose own parameters and statistics stay (the
            function is then not kept across it: `plan.exact` is False); "affine" pins its input
            and rescales gamma and beta, which is exact.
        biases: "rescale" (they follow their layer and do not count in the norm), "skip" (they
            stay, as in the original program: not exact), "balance" (they count too).
        frozen: "pin" keeps parameters with requires_grad=False as they are; "rescale" does not
            treat them differently.
        rules: {MyModule: rule} for modules of your own that torch's calls do not describe (a
            custom kernel). Modules of exactly that class are not looked into; the rule gets
            the context, the labels of the inputs and, by name, of the module's parameters, and
            returns the label of the output: see `enorm_fx.rules`.
        tracer: "symbolic" (record the torch calls of one run on fake tensors), "export"
            (torch.export), or "auto": the first of them that can trace the model.

    Raises:
        ArgumentError: an argument has no such value.
        TraceError: the model cannot be traced with these inputs.

    Source: Stock et al., Equi-normalization of Neural Networks, ICLR 2019 (arXiv:1902.10416).
    """
    _check(model, batchnorm=batchnorm, biases=biases, frozen=frozen, tracer=tracer)
    custom = {module_key(kind): rule for kind, rule in (rules or {}).items()}
    opaque = tuple(rules or ())
    traced = trace_both(model, lambda: trace(model, example_inputs, tracer, opaque))
    pinned = frozenset(
        name for name, p in model.named_parameters() if frozen == "pin" and not p.requires_grad
    )
    labels = propagate(traced, batchnorm=batchnorm, biases=biases, frozen=pinned, custom=custom)
    solution = solve(labels.system)
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
    return Plan(
        model=model,
        parameters=parameters,
        groups=groups,
        pairs=pairs,
        blocked=_blocked(traced, labels, solution, names),
        num_scales=sum(basis.groups),
        exact=not _any_free(solution, basis, labels.ignored),
        graph=shown(graph, traced),
        tracer=traced.front_end,
        inputs=traced.inputs,
        notes=traced.notes,
    )


def _check(model: nn.Module, **choices: str) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for name, value in choices.items():
        if value not in _CHOICES[name]:
            allowed = ", ".join(repr(v) for v in _CHOICES[name])
            raise ArgumentError(f"{name} must be one of {allowed}, not {value!r}")


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


def _renumbered(terms: tuple[Term, ...], basis: Basis) -> tuple[Term, ...]:
    result = []
    for term in terms:
        index = torch.where(term.index >= 0, basis.index[term.index], -1)
        if bool((index >= 0).any()):
            result.append(Term(term.coefficient, index))
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
    free: dict[str, tuple[Term, ...]],
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


def _sides(free: dict[str, tuple[Term, ...]], group_of: Tensor) -> dict[str, dict[int, set[int]]]:
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


def _blocked(
    trace: Trace, labels: Labels, solution: Solution, weights: dict[str, Node]
) -> tuple[Blocked, ...]:
    """For every weight the sides that nothing may rescale, with the reason."""
    why = causes(labels.system, solution)
    first_reader: dict[str, Node] = {}
    for node in trace.nodes:
        for source in node.inputs():
            if source.op == PARAMETER:
                first_reader.setdefault(source.name, node)
    result = []
    for name, weight in weights.items():
        label = labels.parameters[name]
        outer = [t for t in label.terms if t.coefficient > 0]
        inner = [t for t in label.terms if t.coefficient < 0]
        for side, terms in (("output", outer), ("input", inner)):
            if side == "input" and len(weight.out.shape) < 2:
                continue
            if any(bool((solution.root[t.ids] >= 0).any()) for t in terms):
                continue
            chain = [o for t in terms[:1] for o in why.chain(t.ids)]
            if not terms:
                chain = _source_of_pin(trace, labels, first_reader[name], name)
            result.append(_explained(name, side, [labels.origins[o] for o in chain]))
    return tuple(result)


def _explained(weight: str, side: str, chain: list[Origin]) -> Blocked:
    if not chain:
        return Blocked(weight, side, "its values are given", "", "")
    first, *rest = chain
    steps = tuple(f"{o.reason} ({', '.join(x for x in (o.node, o.source) if x)})" for o in rest)
    return Blocked(weight, side, first.reason, first.node, first.source, steps)


def _source_of_pin(trace: Trace, labels: Labels, reader: Node, weight: str) -> list[int]:
    """Walk back from what a weight reads to the call whose result keeps its values."""
    queue = deque(n for n in reader.inputs() if not (n.op == PARAMETER and n.name == weight))
    seen: set[int] = set()
    while queue:
        node = queue.popleft()
        if node.index in labels.pinned_at:
            return [labels.pinned_at[node.index]]
        if node.index not in seen:
            seen.add(node.index)
            queue.extend(node.inputs())
    return []
