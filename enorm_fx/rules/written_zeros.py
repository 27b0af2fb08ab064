"""Where tensors of zeros are written into, by a call at any time.

What a model shifts by writing slices into zeros leaves zeros at the ends: weights that read them
alone reach no output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from enorm_fx.rules.boxes import Box, along, box, everything
from enorm_fx.rules.moves import axis_numbers, marked, moved_ids
from enorm_fx.rules.registry import Flow, find
from enorm_fx.symmetry.labels import Label, LabelTerm
from enorm_fx.tracing.trace import Node, Spec, Trace, memories, targets_of


def written_into(trace: Trace, zeros: Node) -> Box:
    """A box outside of which what a call gave stays zero: all of it where that cannot be told.

    Writes into the tensor are followed, and writes into views that calls which move entries made.
    """
    shape: tuple[int, ...] = zeros.out.shape
    found = along(torch.zeros(shape[0], dtype=torch.bool), 0, len(shape))
    if zeros.index not in trace.written:
        return found
    memory = set(memories(zeros.out))
    places = tuple(LabelTerm(1, numbers) for numbers in axis_numbers(shape))
    views = {zeros.index: Label(shape, places)}  # which of the places each has
    for call in trace.nodes[zeros.index + 1 : trace.shown]:
        targets = [n for n in targets_of(call) if not memory.isdisjoint(memories(n.out))]
        if targets:
            if any(target.index not in views for target in targets):
                return everything(shape)
            for target in targets:
                chosen = _chosen(call, views[target.index])
                if chosen is None:
                    return everything(shape)
                marks = marked(iter(chosen), sum(shape))
                found = found | box(marks.split(list(shape)))
            if isinstance(call.out, Spec):  # what the call writes into is what it gives
                own = views[targets[0].index]
                if call.out.shape != own.shape or _moves(call):  # transposed in place, say
                    return everything(shape)
                views[call.index] = own
        elif not memory.isdisjoint(memories(call.out)):
            seen = _viewed(trace, call, views, sum(shape))
            if seen is not None:
                views[call.index] = seen
    return found


def _moves(call: Node) -> bool:
    entry = find(call.op)
    return entry is not None and entry.flow is Flow.MOVES


def _viewed(trace: Trace, call: Node, views: dict[int, Label], count: int) -> Label | None:
    """The places that a view of a view has."""
    sources = {n.index: views[n.index] for n in call.inputs() if n.index in views}
    if not _moves(call) or len(sources) != 1:
        return None
    moved = moved_ids(trace, call, sources, count)
    return moved if isinstance(moved, Label) else None


def _chosen(call: Node, target: Label) -> list[Tensor] | None:
    """The places that a call writes into; None where its index is not made of numbers alone."""
    if call.op != "setitem":
        return [term.ids for term in target.terms]
    index = call.args[1]
    given = index if isinstance(index, tuple) else (index,)
    if not all(_is_number(i) or _is_slice(i) or _is_list(i) for i in given):
        return None
    return [term.ids.expand(target.shape)[index] for term in target.terms]


def _is_number(index: Any) -> bool:
    return type(index) is int or index is Ellipsis or index is None


def _is_slice(index: Any) -> bool:
    return isinstance(index, slice) and all(
        end is None or type(end) is int for end in (index.start, index.stop, index.step)
    )


def _is_list(index: Any) -> bool:
    return isinstance(index, list) and all(type(i) is int for i in index)
