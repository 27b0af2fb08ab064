"""Which sides of weights stay pinned, and the call that is the reason."""

from __future__ import annotations

from collections import deque

from enorm_fx.plan.records import Blocked
from enorm_fx.rules import Labels, Origin
from enorm_fx.rules.registry import Flow, find
from enorm_fx.symmetry.causes import causes
from enorm_fx.symmetry.solution import Solution
from enorm_fx.tracing.op_traits import CONTRACTIONS
from enorm_fx.tracing.trace import CONSTANT, INPUT, PARAMETER, Node, Trace


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
            reader = first_reader[name]
            if side == "input" and not _has_input_side(weight.out.shape, reader):
                continue
            if any(bool((solution.root[t.ids] >= 0).any()) for t in terms):
                continue
            chain = [labels.origins[o] for t in terms[:1] for o in why.chain(t.ids)]
            if not terms:
                found = _source_of_pin(trace, labels, reader, name)
                chain = [labels.origins[o] for o in found] or _ties_slices(trace, labels, weight)
            result.append(_explained(name, side, chain))
    return tuple(result)


def _has_input_side(shape: tuple[int, ...], reader: Node) -> bool:
    """Not for one number a slice that multiplies what something else makes, as weight_norm's g."""
    several = sum(n > 1 for n in shape) > 1
    return len(shape) > 1 and (several or reader.op in CONTRACTIONS)


def _ties_slices(trace: Trace, labels: Labels, weight: Node) -> list[Origin]:
    """Forwards from a weight that something is computed of, alone, before it meets an activation:
    the call that keeps it as it is, or else the first that does more than to move its entries."""
    made, alone = {weight.index}, set[int]()  # of the weight; of parameters and constants alone
    first: Node | None = None
    for node in trace.nodes:
        inputs = {n.index for n in node.inputs()}
        if node.op in (PARAMETER, CONSTANT) or (node.op != INPUT and inputs <= alone):
            alone.add(node.index)
        if not made & inputs or not inputs <= alone:
            continue
        made.add(node.index)
        if node.index in labels.pinned_at:
            return [labels.origins[labels.pinned_at[node.index]]]
        entry = find(node.op)
        if first is None and (entry is None or entry.flow is not Flow.MOVES):
            first = node
    if first is None:
        return []
    reason = f"'{first.op}' asks that its slices on this side scale alike"
    place = f"{first.module}.{first.op}".lstrip(".")
    return [Origin(reason, place, first.source, first.index)]


def _explained(weight: str, side: str, chain: list[Origin]) -> Blocked:
    """The record of one side, caused by what is nearest to the weight in its chain and lets a
    tensor keep its values; or else by the first of the chain."""
    if not chain:
        return Blocked(weight, side, "its values are given", "", "")
    nearest = max((k for k, origin in enumerate(chain) if origin.keeps), default=0)
    first, *rest = chain[nearest:]
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
