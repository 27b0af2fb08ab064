"""Where calls that only move entries put them: the rule itself moves numbers of places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from enorm_fx.nested import instances, replaced
from enorm_fx.rules.registry import Context, Flow, bind, find
from enorm_fx.symmetry.labels import Label, LabelTerm, System
from enorm_fx.tracing.trace import PARAMETER, Node, Spec, Trace

# Calls whose result may lack entries that they are given; those with several results may, too.
MAY_DROP = (
    "getitem", "index", "select", "select_copy", "slice", "narrow", "index_select", "gather",
    "diagonal", "as_strided",
)  # fmt: skip


def moved_ids(trace: Trace, node: Node, ids: Mapping[int, Any], largest: int) -> Any:
    """Where ids of some operands go in a call that moves entries, as the labels of its results.

    ids: by node index arrays of ids, from 1 to `largest`, or a label. None where the call asks
    that places are alike: it is not known then which of them it reads.
    """
    context = Context(trace, System(), node=node)
    context.system.fresh(largest)
    entry = find(node.op)
    assert entry is not None

    def label(source: Node) -> Any:
        if source.index in ids:
            own = ids[source.index]
            if not isinstance(own, list):
                return own
            return Label(source.out.shape, tuple(LabelTerm(1, array) for array in own))
        if not isinstance(source.out, Spec):
            return tuple(Label(spec.shape) for spec in instances(Spec, source.out))
        floating = source.out.dtype.is_floating_point
        return Label(source.out.shape, node=-1 if floating else source.index)

    before = len(context.system.equations)
    try:
        bound = bind(entry, context, node)
    except TypeError:
        return None
    for name, value in bound.arguments.items():
        bound.arguments[name] = replaced(Node, value, label)
    result = entry.function(*bound.args, **bound.kwargs)
    if result is NotImplemented or len(context.system.equations) > before:
        return None
    return result


def axis_numbers(shape: Sequence[int]) -> list[Tensor]:
    """For each axis ids along it, from 1 on, those of one axis after those of the other."""
    numbers = torch.arange(1, sum(shape) + 1).split(list(shape))
    return [
        ids.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        for axis, ids in enumerate(numbers)
    ]


def marked(labels: Iterator[Tensor], size: int) -> Tensor:
    """Which of the ids 1, 2, ... `size` occur, as (size,) bool."""
    found = torch.zeros(size + 1, dtype=torch.bool)
    for ids in labels:
        found[ids[ids <= size].reshape(-1)] = True
    return found[1:]


Parts = tuple[Tensor | None, ...]


def parts_read(trace: Trace) -> dict[str, Parts]:
    """Parameters that are read in parts: for each axis the number of the part that a place is in,
    None where all places are in one.

    Places are in one part if every call that reads one of them reads the others too.
    """
    readers: dict[int, list[Node]] = {}
    for node in trace.nodes:
        for source in dict.fromkeys(node.inputs()):
            if source.op == PARAMETER or source.index in readers:
                readers.setdefault(source.index, []).append(node)
                if _moves_one(node):
                    readers.setdefault(node.index, [])
    result = {}
    for node in trace.nodes:
        if node.op == PARAMETER and any(map(_may_drop, _descendants(node, readers))):
            axes = range(len(node.out.shape))
            parts = tuple(_parts_along(trace, node, axis, readers) for axis in axes)
            if any(p is not None for p in parts):
                result[node.name] = parts
    return result


def _moves_one(node: Node) -> bool:
    """Whether a call moves entries of one tensor and does nothing else."""
    entry = find(node.op)
    moves = entry is not None and entry.flow is Flow.MOVES
    return moves and sum(_is_floating(source) for source in node.inputs()) == 1


def _is_floating(node: Node) -> bool:
    return any(spec.dtype.is_floating_point for spec in instances(Spec, node.out))


def _may_drop(node: Node) -> bool:
    return _moves_one(node) and (node.op in MAY_DROP or isinstance(node.out, tuple))


def _descendants(node: Node, readers: Mapping[int, list[Node]]) -> Iterator[Node]:
    """The calls that read a tensor, or what is moved out of it."""
    for reader in readers.get(node.index, ()):
        yield reader
        yield from _descendants(reader, readers)


def _parts_along(
    trace: Trace, node: Node, axis: int, readers: Mapping[int, list[Node]]
) -> Tensor | None:
    shape = node.out.shape
    size = shape[axis]
    if size == 1:
        return None
    along = [size if a == axis else 1 for a in range(len(shape))]
    start = Label(shape, (LabelTerm(1, torch.arange(1, size + 1).reshape(along)),))
    part = torch.zeros(size, dtype=torch.int64)
    for read in _read_together(trace, node, start, size, readers):
        part = (2 * part + read).unique(return_inverse=True)[1]
    return part if bool((part != 0).any()) else None


def _read_together(
    trace: Trace, node: Node, own: Any, size: int, readers: Mapping[int, list[Node]]
) -> Iterator[Tensor]:
    """For each call at the end of a chain of moves which of the ids it reads."""
    for reader in readers.get(node.index, ()):
        label = moved_ids(trace, reader, {node.index: own}, size) if _moves_one(reader) else None
        if label is None:
            labels = own if isinstance(own, tuple) else (own,)
            yield marked((term.ids for part in labels for term in part.terms), size)
        else:
            yield from _read_together(trace, reader, label, size, readers)
