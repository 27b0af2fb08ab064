"""Several traces of one model, as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from enorm_fx.nested import instances, replaced
from enorm_fx.tracing.trace import PARAMETER, Node, Spec, Trace


def joined(traces: Sequence[Trace], notes: tuple[str, ...] = ()) -> Trace:
    """All that any of the traces does, over one set of parameters. Graphs show the first one."""
    first, *others = traces
    if not others:
        return replace(first, notes=(*first.notes, *notes), _values={}) if notes else first
    nodes = list(first.nodes)
    outputs = list(first.outputs)
    tied = dict(first.tied)
    all_notes = [*first.notes]
    parameters = {n.name: n for n in nodes if n.op == PARAMETER}
    lowest = min((spec.memory for n in nodes for spec in instances(Spec, n.out)), default=0)
    memories: dict[tuple[int, int], int] = {}
    starts = [0]
    for number, trace in enumerate(others):
        starts.append(len(nodes))

        def elsewhere(spec: Spec, number: int = number) -> Spec:
            """The same in other memory: two runs share none, whatever the addresses say."""
            if not spec.memory:
                return spec
            new = memories.setdefault((number, spec.memory), min(lowest, 0) - len(memories) - 1)
            return replace(spec, memory=new)

        made: dict[int, Node] = {}
        for node in trace.nodes:
            if node.op == PARAMETER and node.name in parameters:
                made[node.index] = parameters[node.name]
                continue
            copied = _copied(node, len(nodes), made, replaced(Spec, node.out, elsewhere))
            if node.op == PARAMETER:
                parameters[node.name] = copied
            made[node.index] = copied
            nodes.append(copied)
        outputs += [(made[n.index], how) for n, how in trace.outputs]
        tied = {**trace.tied, **tied}
        all_notes += trace.notes
    return replace(
        first,
        nodes=tuple(nodes),
        outputs=tuple(outputs),
        tied=tied,
        notes=tuple(dict.fromkeys((*all_notes, *notes))),
        cut=any(trace.cut for trace in traces),
        shown=len(first.nodes),
        starts=tuple(starts),
        _values={},
    )


def _copied(node: Node, index: int, made: dict[int, Node], out: Any) -> Node:
    args, kwargs = replaced(Node, (node.args, node.kwargs), lambda n: made[n.index])
    return replace(node, index=index, args=args, kwargs=kwargs, out=out)
