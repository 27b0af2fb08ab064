"""Pairs of a producer and a consumer, derived from a plan's groups and dataflow when asked for.

A group of a residual stream has as many producers and consumers as there are blocks, and the
square of that of pairs. So a plan keeps groups; `direct_pairs` gives the pairs that people read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import networkx as nx

from enorm_fx.plan.graph import readers
from enorm_fx.plan.records import Group, Pair


@dataclass(frozen=True, slots=True)
class _Flow:
    """Where one group's scale is made, carried and taken back.

    starts:   producer -> the calls that read it; ends: call -> the consumer that it reads.
    carrying: the calls whose result has the scale.
    """

    group: Group
    starts: dict[str, list[int]]
    ends: dict[int, str]
    carrying: set[int]


def _flows(graph: nx.DiGraph, groups: Sequence[Group]) -> Iterator[_Flow]:
    """The flow of every group, in the order of the groups."""
    reading = readers(graph)
    carrying: list[set[int]] = [set() for _ in groups]
    for node, data in graph.nodes(data=True):
        for g in data["groups"]:
            carrying[g].add(node)
    for group, nodes in zip(groups, carrying, strict=True):
        starts = {name: reading.get(name, []) for name in group.producers}
        ends = {node: name for name in group.consumers for node in reading.get(name, ())}
        yield _Flow(group, starts, ends, nodes)


def all_pairs(graph: nx.DiGraph, groups: Sequence[Group]) -> tuple[Pair, ...]:
    """Every producer with every consumer that its scale reaches, in execution order."""
    found: list[tuple[int, Pair]] = []
    for flow in _flows(graph, groups):
        for producer, starts in flow.starts.items():
            reached = _forward(graph, flow, starts)
            # A call may read both, as attention reads its packed projections.
            within = [flow.ends[node] for node in starts if node in flow.ends]
            reached.update((name, ()) for name in within if name not in reached)
            for consumer, via in reached.items():
                found.append((starts[0], Pair(producer, consumer, flow.group.channels, via)))
    return _in_order(found)


def _forward(graph: nx.DiGraph, flow: _Flow, starts: list[int]) -> dict[str, tuple[str, ...]]:
    """Consumer -> ops on the shortest path from `starts`, neither end included."""
    parent: dict[int, int | None] = {node: None for node in starts if node in flow.carrying}
    queue = deque(parent)
    found: dict[str, tuple[str, ...]] = {}
    while queue:
        node = queue.popleft()
        for after in graph.successors(node):
            consumer = flow.ends.get(after)
            if consumer is not None and consumer not in found:
                found[consumer] = _ops(graph, parent, node)[::-1]
            if after in flow.carrying and after not in parent:
                parent[after] = node
                queue.append(after)
    return found


def direct_pairs(graph: nx.DiGraph, groups: Sequence[Group]) -> tuple[Pair, ...]:
    """The pairs between which no other producer or consumer of their group lies.

    A call lies between two others if it depends on the one and the other depends on it. A consumer
    that would have no pair at all (what a squeeze-and-excitation gate multiplies is read after the
    gate has read it) is listed with the producers that are nearest to it.
    """
    bit, before, after = _dependencies(graph)
    found: list[tuple[int, Pair]] = []
    left: list[tuple[_Flow, dict[int, str], int, dict[int, None]]] = []
    for flow in _flows(graph, groups):
        producers = {node: name for name, nodes in flow.starts.items() for node in nodes}
        members = sum(bit[node] for node in {*producers, *flow.ends})
        nearest = _nearest_producers(graph, flow, producers, bit, before)
        for end in flow.ends:
            sources = {p: None for n in graph.predecessors(end) for p in nearest.get(n, ())}
            if end in producers:  # one call reads both, as attention reads its packed projections
                sources[end] = None
            between = before[end] & members & ~bit[end]
            direct = {p: None for p in sources if not between & after[p] & ~bit[p]}
            left.append((flow, producers, end, sources))
            found += _pairs_of(graph, flow, producers, end, direct)
    paired = {pair.consumer for _, pair in found}
    for flow, producers, end, sources in left:
        if flow.ends[end] not in paired:
            found += _pairs_of(graph, flow, producers, end, sources)
    once: dict[tuple[str, str, int], tuple[int, Pair]] = {}
    for at, pair in found:
        once.setdefault((pair.producer, pair.consumer, pair.channels), (at, pair))
    return _in_order([*once.values()])


def _pairs_of(
    graph: nx.DiGraph, flow: _Flow, producers: dict[int, str], end: int, sources: dict[int, None]
) -> list[tuple[int, Pair]]:
    """The pairs of one consuming call with some producing calls."""
    paths = _backward(graph, flow, end, sources)
    return [
        (start, Pair(producers[start], flow.ends[end], flow.group.channels, paths.get(start, ())))
        for start in sources
    ]


def _dependencies(graph: nx.DiGraph) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    """A bit for each call that reads parameters; for every call the bits before and after it."""
    order = list(graph)  # execution order, which is topological
    reading = [node for node in order if graph.nodes[node]["reads"]]
    bit = {node: 1 << number for number, node in enumerate(reading)}
    before: dict[int, int] = {}
    after: dict[int, int] = {}
    for node in order:
        bits = 0
        for n in graph.predecessors(node):
            bits |= before[n] | bit.get(n, 0)
        before[node] = bits
    for node in reversed(order):
        bits = 0
        for n in graph.successors(node):
            bits |= after[n] | bit.get(n, 0)
        after[node] = bits
    return bit, before, after


def _nearest_producers(
    graph: nx.DiGraph,
    flow: _Flow,
    producers: dict[int, str],
    bit: dict[int, int],
    before: dict[int, int],
) -> dict[int, tuple[int, ...]]:
    """For every call that carries the scale the last producers of it: none depends on another."""
    nearest: dict[int, tuple[int, ...]] = {}
    for node in sorted(flow.carrying):
        if node in producers:
            nearest[node] = (node,)
            continue
        found = {p: None for n in graph.predecessors(node) for p in nearest.get(n, ())}
        hidden = 0
        for p in found:
            hidden |= before[p]
        nearest[node] = tuple(p for p in found if not hidden & bit[p])
    return nearest


def _backward(
    graph: nx.DiGraph, flow: _Flow, end: int, wanted: dict[int, None]
) -> dict[int, tuple[str, ...]]:
    """Producing call -> ops on the shortest path from it to `end`, neither end included."""
    child: dict[int, int | None] = {end: None}
    queue = deque([end])
    found: dict[int, tuple[str, ...]] = {}
    while queue and len(found) < len(wanted):
        node = queue.popleft()
        for source in graph.predecessors(node):
            if source in child or source not in flow.carrying:
                continue
            child[source] = node
            queue.append(source)
            if source in wanted:
                found[source] = _ops(graph, child, node)
    return found


def _ops(graph: nx.DiGraph, towards: dict[int, int | None], node: int) -> tuple[str, ...]:
    """Ops from a call along `towards`, the last call (of which there is no next one) left out."""
    ops: list[str] = []
    at: int | None = node
    while at is not None and towards[at] is not None:
        if graph.nodes[at]["op"] != "piece":
            ops.append(graph.nodes[at]["op"])
        at = towards[at]
    return tuple(ops)


def _in_order(found: list[tuple[int, Pair]]) -> tuple[Pair, ...]:
    """Pairs by the call that produces their scale."""
    return tuple(pair for _, pair in sorted(found, key=lambda item: item[0]))
