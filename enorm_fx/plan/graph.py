"""The dataflow as a networkx graph: depth of weights, and what lies between a pair.

Nodes are the trace's node indices; their attributes are op, name, module, source, parameters (the
names that the call reads), leaf (an input of the model) and groups (numbers of the plan's groups
that scale the call's result).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import networkx as nx

from enorm_fx.tracing.trace import CONSTANT, INPUT, PARAMETER, Trace


def dataflow(trace: Trace) -> nx.DiGraph:
    """One node per call and input, an edge for every tensor that passes; parameters are attributes.

    Calls on parameters alone (a transposed weight) are nodes as well.
    """
    graph = nx.DiGraph()
    for node in trace.nodes:
        if node.op in (PARAMETER, CONSTANT):
            continue
        inputs = list(node.inputs())
        names = tuple(n.name for n in inputs if n.op == PARAMETER)
        graph.add_node(
            node.index,
            op=node.op,
            name=node.name,
            module=node.module,
            source=node.source,
            parameters=names,
            leaf=node.op == INPUT,
        )
        graph.add_edges_from((n.index, node.index) for n in inputs if n.index in graph)
    return graph


def shown(graph: nx.DiGraph, trace: Trace) -> nx.DiGraph:
    """The part of the dataflow that belongs to the mode that the model is in."""
    if trace.shown is None:
        return graph
    return graph.subgraph([n for n in graph if n < trace.shown]).copy()


def depths(graph: nx.DiGraph, weights: Iterable[str]) -> tuple[dict[str, int], set[str]]:
    """Depth of every parameter, and the weights after which no other weight comes.

    The depth of a weight is the number of weights on the longest path that ends in it; other
    parameters have that of the weights around them. Insertion order is execution order, which
    is topological.
    """
    counted = set(weights)
    at: dict[int, int] = {}
    depth: dict[str, int] = {}
    for node, data in graph.nodes(data=True):
        before = max((at[n] for n in graph.predecessors(node)), default=0)
        at[node] = before + (1 if counted.intersection(data["parameters"]) else 0)
        for name in data["parameters"]:
            depth[name] = max(depth.get(name, 1), at[node])
    below: dict[int, bool] = {}  # does a weight come after this node?
    early: set[str] = set()
    for node in reversed(list(graph)):
        later = any(below[n] for n in graph.successors(node))
        names = counted.intersection(graph.nodes[node]["parameters"])
        if later:
            early |= names
        below[node] = later or bool(names)
    return depth, {name for name in depth if name in counted and name not in early}


def readers(graph: nx.DiGraph) -> dict[str, list[int]]:
    """Parameter name -> the calls that read it, in execution order."""
    result: dict[str, list[int]] = {}
    for node, data in graph.nodes(data=True):
        for name in data["parameters"]:
            result.setdefault(name, []).append(node)
    return result


def paths(
    graph: nx.DiGraph, carrying: set[int], starts: list[int], ends: dict[int, str]
) -> dict[str, tuple[str, ...]]:
    """From where a scale is produced to each call that takes it back.

    carrying: nodes whose result has the scale; starts: nodes that make it; ends: consuming node
    -> weight. Returns weight -> ops on the shortest path, ends not included.
    """
    parent: dict[int, int | None] = {start: None for start in starts if start in carrying}
    queue = deque(parent)
    found: dict[str, tuple[str, ...]] = {}
    while queue:
        node = queue.popleft()
        for after in graph.successors(node):
            if after in ends and ends[after] not in found:
                found[ends[after]] = _ops(graph, parent, node)
            if after in carrying and after not in parent:
                parent[after] = node
                queue.append(after)
    return found


def _ops(graph: nx.DiGraph, parent: dict[int, int | None], node: int) -> tuple[str, ...]:
    ops: list[str] = []
    at: int | None = node
    while at is not None and parent[at] is not None:
        if graph.nodes[at]["op"] != "piece":
            ops.append(graph.nodes[at]["op"])
        at = parent[at]
    return tuple(reversed(ops))
