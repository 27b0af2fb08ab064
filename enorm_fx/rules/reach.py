"""Which entries of the parameters reach an output.

A scale that moves only entries which reach no output is none: channels that are sliced away before
anything reads them, weights that multiply zeros which a padding has put in. Two passes over the
trace find them: forwards, where tensors are zero whatever the weights are; backwards, which entries
some output is made of. Both keep one box a tensor and err on one side alone: what reaches an output
is never left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import BoundArguments
from typing import Any

import torch
from torch import Tensor

from enorm_fx.nested import instances
from enorm_fx.rules.boxes import Box, box, everything
from enorm_fx.rules.moves import MAY_DROP, axis_numbers, marked, moved_ids
from enorm_fx.rules.reach_ops import READERS, Read, axes_gone
from enorm_fx.rules.registry import Context, Entry, Flow, bind, find
from enorm_fx.rules.written_zeros import written_into
from enorm_fx.symmetry.labels import Label, System
from enorm_fx.tracing.normalize import PIECE_KEY
from enorm_fx.tracing.op_traits import GIVES_ZEROS, READS_SHAPES_ALONE
from enorm_fx.tracing.trace import CONSTANT, INPUT, PARAMETER, Node, Spec, Trace, memories


def reached(trace: Trace) -> dict[str, Box]:
    """The entries of each parameter that reach an output in the mode that the model is in, or more.

    Parameters that are missing reach none.
    """
    return _Backwards(trace, _nonzero(trace)).run()


# --- forwards: what is zero ----------------------------------------------------------------------


def _nonzero(trace: Trace) -> dict[int, Box]:
    """By node index a box outside of which a result is zero; results that are missing may be
    different from zero everywhere."""
    found: dict[int, Box] = {}
    for node in trace.nodes[: trace.shown]:
        spec = node.out
        if not isinstance(spec, Spec) or not spec.shape:
            continue
        if node.op in GIVES_ZEROS:
            changed = written_into(trace, node)
            if not changed.whole:
                found[node.index] = changed
        elif node.index in trace.written:
            continue
        elif node.op == "pad" or (found and any(n.index in found for n in node.inputs())):
            result = _nonzero_result(trace, node, found)
            if result is not None and not result.whole:
                found[node.index] = result
    return found


def _nonzero_result(trace: Trace, node: Node, found: Mapping[int, Box]) -> Box | None:
    entry = find(node.op)
    if entry is None:
        return None
    if node.op == "pad":
        return _padded(node, found)
    if entry.flow is Flow.MOVES:
        return _moved_nonzero(trace, node, found)
    if node.op in _REDUCTIONS:
        return _reduced(trace, node, entry, found)
    operands = [n for n in node.inputs() if isinstance(n.out, Spec)]
    shape = node.out.shape
    if entry.flow not in (Flow.PASSES, Flow.PRODUCT, Flow.SUM):
        return None
    if not all(_broadcasts(n.out.shape, shape) for n in operands):
        return None
    boxes = [
        found.get(n.index, everything(n.out.shape)).spread(n.out.shape, shape) for n in operands
    ]
    if entry.flow is Flow.PASSES:
        return boxes[0]
    if entry.flow is Flow.PRODUCT:
        result = boxes[0]
        for other in boxes[1:]:
            result = result & other
        return result
    if entry.flow is Flow.SUM and _only_tensors(node):
        result = boxes[0]
        for other in boxes[1:]:
            result = result | other
        return result
    return None


# What these give of zeros is zero.
_REDUCTIONS = ("sum", "mean", "nansum", "nanmean", "amax", "amin")


def _reduced(trace: Trace, node: Node, entry: Entry, found: Mapping[int, Box]) -> Box | None:
    """Along the axes that stay what is zero stays so."""
    source = next(node.inputs())
    if source.index not in found:
        return None
    try:
        dim = bind(entry, Context(trace, System()), node).arguments["dim"]
    except TypeError:
        return None
    inside = found[source.index].axes
    gone = axes_gone(dim, len(inside))
    if gone is None:
        return None
    if len(node.out.shape) == len(inside):
        return Box(tuple(None if a in gone else places for a, places in enumerate(inside)))
    return Box(tuple(places for a, places in enumerate(inside) if a not in gone))


def _only_tensors(node: Node) -> bool:
    """Whether nothing but tensors is added."""
    return all(isinstance(value, Node) for value in node.args[:2]) and len(node.args) > 1


def _padded(node: Node, found: Mapping[int, Box]) -> Box | None:
    source, sizes, *rest = node.args
    kwargs = {"mode": "constant", "value": None, **dict(zip(("mode", "value"), rest, strict=False))}
    kwargs.update(node.kwargs)
    if kwargs["mode"] != "constant" or kwargs["value"]:
        return None
    shape = source.out.shape
    inside = list(found.get(source.index, everything(shape)).axes)
    for i in range(0, len(sizes), 2):
        axis, (before, after) = len(shape) - 1 - i // 2, sizes[i : i + 2]
        if before < 0 or after < 0:
            return None
        if before or after:
            own = inside[axis]
            own = torch.ones(shape[axis], dtype=torch.bool) if own is None else own
            inside[axis] = torch.cat([own.new_zeros(before), own, own.new_zeros(after)])
    return Box(tuple(inside))


def _has_entries(node: Node) -> bool:
    spec = node.out
    return isinstance(spec, Spec) and bool(spec.shape) and spec.dtype.is_floating_point


def _moved_nonzero(trace: Trace, node: Node, found: Mapping[int, Box]) -> Box | None:
    """Where the entries of operands that may differ from zero are moved to, axis by axis."""
    shape = node.out.shape
    inside = [torch.ones(n, dtype=torch.bool) for n in shape]
    operands = {n.index: n for n in node.inputs() if _has_entries(n)}
    longest = max(len(n.out.shape) for n in operands.values())
    for k in range(longest):
        # An entry is zero if it is outside of its operand's box along some axis.
        flags = {}
        for n in operands.values():
            own = found[n.index].axes[k] if n.index in found and k < len(n.out.shape) else None
            own = torch.ones(1, dtype=torch.bool) if own is None else own
            size = [1] * len(n.out.shape)
            size[min(k, len(size) - 1)] = len(own)
            flags[n.index] = [1 + own.long().reshape(size)]  # 1: zero, 2: not
        moved = moved_ids(trace, node, flags, 2)
        if moved is None or not isinstance(moved, Label):
            return None
        zero = torch.ones((), dtype=torch.bool)
        for term in moved.terms:
            zero = zero & (term.ids == 1)
        if not moved.terms:
            return None
        for axis in range(len(shape)):
            if zero.shape[axis] > 1:
                rest = [a for a in range(len(shape)) if a != axis]
                inside[axis] &= ~(zero.all(dim=rest) if rest else zero)
    return Box(tuple(inside))


# --- backwards: what outputs are made of ---------------------------------------------------------


@dataclass(slots=True)
class _Backwards:
    """What reaches an output.

    whole:   nodes whose results reach it as a whole; nearly all of most traces.
    parts:   boxes of those that reach it in part, by node and the number of the result.
    sharing: nodes that look at memory which is written, by memory.
    """

    trace: Trace
    nonzero: dict[int, Box]
    whole: set[int] = field(default_factory=set)
    parts: dict[tuple[int, int], Box] = field(default_factory=dict)
    sharing: dict[int, list[Node]] = field(default_factory=dict)

    def run(self) -> dict[str, Box]:
        nodes = self.trace.nodes[: self.trace.shown]
        for node in nodes:
            if node.index in self.trace.written:
                for memory in memories(node.out):
                    self.sharing.setdefault(memory, []).append(node)
        for node, _ in self.trace.outputs:
            if node.index < len(nodes):
                self.whole.add(node.index)
        result: dict[str, Box] = {}
        for node in reversed(nodes):
            if node.op == PARAMETER:
                own = self._box(node, node.out)
                if own is not None:
                    result[node.name] = own | result.get(node.name, own)
            elif node.inplace and (node.out is None or node.index in self.trace.seen_elsewhere):
                if self._written_matters(node):
                    self._all_inputs(node)
            elif self._is_live(node):
                self._pass_on(node)
        return result

    def _written_matters(self, call: Node) -> bool:
        """Whether some tensor is read later that looks at the memory which is written."""
        written = list(memories(next(call.inputs()).out))
        views = [node for memory in written for node in self.sharing[memory]]
        outside = any(node.op in (INPUT, PARAMETER, CONSTANT) for node in views)
        return outside or not written or any(map(self._is_live, views))

    def _is_live(self, node: Node) -> bool:
        if node.index in self.whole:
            return True
        count = len(node.out) if isinstance(node.out, tuple) else 1
        return any((node.index, k) in self.parts for k in range(count))

    def _box(self, node: Node, spec: Any, piece: int = 0) -> Box | None:
        """Of one of the results of a node; None where it reaches no output."""
        if node.index in self.whole:
            return everything(spec.shape if isinstance(spec, Spec) else ())
        return self.parts.get((node.index, piece))

    def _all(self, node: Node) -> None:
        self.whole.add(node.index)

    def _all_inputs(self, node: Node) -> None:
        self.whole.update(source.index for source in node.inputs())

    def _add(self, node: Node, live: Box, piece: int = 0) -> None:
        if live.whole and not isinstance(node.out, tuple):
            self.whole.add(node.index)
        elif not live.empty and node.index not in self.whole:
            key = node.index, piece
            self.parts[key] = self.parts[key] | live if key in self.parts else live

    def _drops_nothing(self, node: Node) -> bool:
        """Whether all of a result matters, and with it all that the call is given."""
        if node.index not in self.whole or node.op in MAY_DROP or node.op == PIECE_KEY:
            return False
        return not isinstance(node.out, tuple) and not self._meets_zeros(node)

    def _pass_on(self, node: Node) -> None:
        """From a result to the operands of the call that made it."""
        if node.op in READS_SHAPES_ALONE:
            return None
        if self._drops_nothing(node):
            return self._all_inputs(node)
        entry = find(node.op)
        if entry is None or node.kwargs.get("out") is not None:
            return self._all_inputs(node)
        if self._from_tuple(node):
            return None
        if entry.flow is Flow.MOVES:
            return self._moves(node)
        if not isinstance(node.out, Spec):
            return self._all_inputs(node)
        live = self._box(node, node.out)
        assert live is not None
        if entry.flow in (Flow.PASSES, Flow.ENTRIES, Flow.PRODUCT, Flow.SUM):
            return self._entry_by_entry(node, live, entry.flow)
        if node.op in READERS:
            try:
                bound = bind(entry, Context(self.trace, System()), node)
            except TypeError:
                return self._all_inputs(node)
            return self._read(node, bound, live)
        return self._all_inputs(node)

    def _meets_zeros(self, node: Node) -> bool:
        return bool(self.nonzero) and any(n.index in self.nonzero for n in node.inputs())

    def _from_tuple(self, node: Node) -> bool:
        """One of several results that a call gave."""
        if node.op not in (PIECE_KEY, "getitem") or not isinstance(node.args[0], Node):
            return False
        source, number = node.args
        if not isinstance(source.out, tuple):
            return False
        live = self._box(node, node.out)
        if live is None or not isinstance(number, int) or not isinstance(source.out[number], Spec):
            self._all(source)
        else:
            self._add(source, live, number % len(source.out))
        return True

    def _entry_by_entry(self, node: Node, live: Box, flow: Flow) -> None:
        shape = node.out.shape
        operands = list(node.inputs())
        for source in operands:
            if not isinstance(source.out, Spec) or not _broadcasts(source.out.shape, shape):
                self._all(source)
                continue
            own = live
            if flow is Flow.PRODUCT:  # what is multiplied by zero alone does not matter
                for other in operands:
                    if other is not source and other.index in self.nonzero:
                        own = own & self.nonzero[other.index].spread(other.out.shape, shape)
            if not own.empty:
                self._add(source, own.gathered(source.out.shape, shape))

    def _read(self, node: Node, bound: BoundArguments, live: Box) -> None:
        boxes = READERS[node.op](Read(bound.arguments, live, node.out.shape, self.nonzero))
        for name, value in bound.arguments.items():
            for source in instances(Node, value):
                if name in boxes:
                    self._add(source, boxes[name])
                else:
                    self._all(source)

    def _moves(self, node: Node) -> None:
        """The places that the live entries of the result come from, axis by axis."""
        for source in dict.fromkeys(node.inputs()):
            spec = source.out
            if not isinstance(spec, Spec):
                self._all(source)
            elif spec.dtype.is_floating_point:
                self._add(source, self._origins(node, source))
            else:
                self._all(source)

    def _origins(self, node: Node, source: Node) -> Box:
        """The places of an operand that the live entries of the results come from."""
        shape = source.out.shape
        axes = range(len(shape))
        numbers = axis_numbers(shape)
        found = self._numbers_read(node, source, numbers, sum(shape))
        if found is not None:
            return box(found.split(list(shape)))
        alone = (self._numbers_read(node, source, [numbers[a]], sum(shape)) for a in axes)
        return box(
            None if found is None else found.split(list(shape))[a]
            for a, found in zip(axes, alone, strict=True)
        )

    def _numbers_read(
        self, node: Node, source: Node, ids: Sequence[Tensor], count: int
    ) -> Tensor | None:
        """Which of the ids that an operand carries arrive at a live entry of the results."""
        moved = moved_ids(self.trace, node, {source.index: ids}, count)
        if moved is None:
            return None
        results = moved if isinstance(moved, tuple) else (moved,)
        specs = node.out if isinstance(moved, tuple) else (node.out,)
        found = []
        for k, (label, spec) in enumerate(zip(results, specs, strict=True)):
            live = self._box(node, spec, k)
            if live is not None:
                found += [live.pick(term.ids) for term in label.terms]
        return marked(iter(found), count)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape may be broadcast to the other; one that is given for its type
    alone need not."""
    own = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(shape, own, strict=True))
