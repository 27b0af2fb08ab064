"""The dataflow as a networkx graph, and the depth of weights in it.

Nodes are the trace's node indices; their attributes are op, name, module, source, parameters (the
names that the call is given), reads (the same, or those that it is given transposed, stacked or
otherwise computed from parameters alone), leaf (an input of the model) and groups (numbers of the
plan's groups that scale the call's result).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import networkx as nx

from enorm_fx.tracing.trace import CONSTANT, INPUT, PARAMETER, Trace


def dataflow(trace: Trace, groups: Mapping[int, tuple[int, ...]]) -> nx.DiGraph:
    """One node per call and input, an edge for every tensor that passes; parameters are attributes.

    Calls on parameters alone (a transposed weight) are nodes as well; what reads their results
    reads the parameters. groups: for each node the groups that scale its result.
    """
    graph = nx.DiGraph()
    made: dict[int, tuple[str, ...]] = {}  # node -> the parameters alone of which it is made
    for node in trace.nodes:
        if node.op == PARAMETER:
            made[node.index] = (node.name,)
        elif node.op == CONSTANT:
            made[node.index] = ()
        else:
            inputs = list(node.inputs())
            names = tuple(name for n in inputs for name in made.get(n.index, ()))
            if node.op != INPUT and names and all(n.index in made for n in inputs):
                made[node.index] = names
            graph.add_node(
                node.index,
                op=node.op,
                name=node.name,
                module=node.module,
                source=node.source,
                parameters=tuple(n.name for n in inputs if n.op == PARAMETER),
                reads=() if node.index in made else tuple(dict.fromkeys(names)),
                leaf=node.op == INPUT,
                groups=groups.get(node.index, ()),
            )
            graph.add_edges_from((n.index, node.index) for n in inputs if n.index in graph)
    return graph


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
        at[node] = before + (1 if counted.intersection(data["reads"]) else 0)
        for name in data["reads"]:
            depth[name] = max(depth.get(name, 1), at[node])
    below: dict[int, bool] = {}  # does a weight come after this node?
    early: set[str] = set()
    for node in reversed(list(graph)):
        later = any(below[n] for n in graph.successors(node))
        names = counted.intersection(graph.nodes[node]["reads"])
        if later:
            early |= names
        below[node] = later or bool(names)
    return depth, {name for name in depth if name in counted and name not in early}


def readers(graph: nx.DiGraph) -> dict[str, list[int]]:
    """Parameter name -> the calls that read it, in execution order."""
    result: dict[str, list[int]] = {}
    for node, data in graph.nodes(data=True):
        for name in data["reads"]:
            result.setdefault(name, []).append(node)
    return result


def ops_between(
    graph: nx.DiGraph, ends: Sequence[tuple[Collection[str], Collection[str]]]
) -> list[tuple[str, ...]]:
    """For each group the ops that lie on some path from its producers to its consumers.

    ends: (producers, consumers) of each group. Each op is named once, in execution order.
    """
    reading = readers(graph)
    carrying: list[list[int]] = [[] for _ in ends]
    for node, data in graph.nodes(data=True):
        for g in data["groups"]:
            carrying[g].append(node)
    result = []
    for nodes, (producers, consumers) in zip(carrying, ends, strict=True):
        starts = {node for name in producers for node in reading.get(name, ())}
        goals = {node for name in consumers for node in reading.get(name, ())}
        reached: set[int] = set()
        for node in nodes:
            if any(n in reached or n in starts for n in graph.predecessors(node)):
                reached.add(node)
        useful: dict[int, None] = {}
        for node in reversed(nodes):
            if node in reached and any(n in useful or n in goals for n in graph.successors(node)):
                useful[node] = None
        ops = [graph.nodes[node]["op"] for node in reversed(useful)]
        result.append(tuple(dict.fromkeys(op for op in ops if op != "piece")))
    return result
