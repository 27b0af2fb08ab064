"""Which sides of weights stay pinned, and the call that is the reason."""

from __future__ import annotations

from collections import deque

from enorm_fx.plan.records import Blocked
from enorm_fx.rules import Labels, Origin
from enorm_fx.symmetry.causes import causes
from enorm_fx.symmetry.solution import Solution
from enorm_fx.tracing.trace import PARAMETER, Node, Trace


def blocked_sides(
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
    """The record of one side; the first entry of its chain is the cause."""
    if not chain:
        return Blocked(weight, side, "its values are given", "", "")
    first, *rest = chain
    return Blocked(weight, side, first.reason, first.node, first.source, tuple(rest), first.index)


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
