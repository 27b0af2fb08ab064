"""The neutral result of tracing: a list of calls on tensors, whichever front end saw them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from enorm_fx import nested
from enorm_fx.nested import instances, replaced
from enorm_fx.tracing.op_traits import MAY_WRITE_BY_A_FLAG, READS_SHAPES_ALONE, WRITES_STATISTICS

INPUT, PARAMETER, CONSTANT, OUTPUT = "input", "parameter", "constant", "output"

# A constant is evaluated only where a rule needs its values; larger ones are treated as unknown.
MAX_CONSTANT = 1 << 22


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and dtype of one tensor; tracing keeps no data.

    memory: tensors with the same number (0: unknown) are views of the same memory.
    layout: strides and offset in that memory, in entries; None: contiguous, from its start.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    memory: int = field(default=0, compare=False)
    layout: tuple[tuple[int, ...], int] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One call, or one tensor that comes from outside: input, parameter, constant.

    op:      neutral key such as "linear", the same for module, function, method and operator.
    args, kwargs: as called, with a Node in place of every tensor.
    out:     a Spec, or a nested tuple of them where the call returns several tensors.
    name:    the parameter's or the input's name; for a call the op with a running number.
    inplace: the call writes into its first argument.
    module:  path of the module that made the call; source: "file.py:line" of the user's code.
    compute: gives a constant's value (or repeats a call on constants); None where it must not.
    """

    index: int
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    name: str
    inplace: bool = False
    module: str = ""
    source: str = ""
    compute: Callable[..., Any] | None = None

    def inputs(self) -> Iterator[Node]:
        """The nodes that this one reads, in argument order."""
        return instances(Node, (self.args, self.kwargs))


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What ran: nodes in execution order, and what leaves the model.

    outputs:    nodes whose values leave the model, each with the way it leaves.
    aliases:    first name of each parameter -> its other names.
    tied:       parameters that must stay as they are, with the reason (shared memory).
    front_end:  "symbolic" or "export".
    inputs:     the call that was traced, as (args, kwargs).
    notes:      what a reader of the plan should know about the trace.
    cut:        the trace ends where what the model does begins to depend on data.
    shown:      how many of the nodes graphs show; the rest are those of the other mode. None: all.
    starts:     index of the first node of each run that was joined.
    written:    indices of the nodes whose memory some call writes into, itself or through a view.
    seen_elsewhere: indices of the calls that work in place and whose effect may be seen through
                another tensor than their result.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[tuple[Node, str], ...]
    aliases: dict[str, tuple[str, ...]]
    tied: dict[str, str]
    front_end: str
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    notes: tuple[str, ...] = ()
    cut: bool = False
    shown: int | None = None
    starts: tuple[int, ...] = (0,)
    written: frozenset[int] = field(init=False)
    seen_elsewhere: frozenset[int] = field(init=False)
    _device: torch.device = field(default_factory=torch.get_default_device)
    _values: dict[int, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "written", _written(self.nodes))
        leaving = {node.index for node, _ in self.outputs}
        object.__setattr__(self, "seen_elsewhere", _seen_elsewhere(self.nodes, leaving))

    def value(self, node: Node) -> Tensor | None:
        """The value of a constant, or of a call on constants alone; None where it has none."""
        if node.index not in self._values:
            self._values[node.index] = None  # unless all goes well
            if _small(node.out) and node.index not in self.written:
                value = self._evaluate(node)
                if not (isinstance(value, Tensor) and value.is_meta):  # that has a shape alone
                    self._values[node.index] = value
        return self._values[node.index]

    def _evaluate(self, node: Node) -> Any:
        if node.compute is None:
            return None
        if node.op == CONSTANT:
            return node.compute()
        if node.op in READS_SHAPES_ALONE:
            inputs = {n.index: _of_shape(n.out) for n in node.inputs()}
        else:
            inputs = {n.index: self.value(n) for n in node.inputs()}
        if any(v is None for v in inputs.values()):
            return None
        args, kwargs = replaced(Node, (node.args, node.kwargs), lambda n: inputs[n.index])
        elsewhere = torch.get_default_device() != self._device
        with torch.no_grad(), self._device if elsewhere else nullcontext():
            return node.compute(*args, **kwargs)


def _of_shape(out: Any) -> Tensor | None:
    return torch.zeros(1, dtype=out.dtype).expand(out.shape) if isinstance(out, Spec) else None


def _written(nodes: tuple[Node, ...]) -> frozenset[int]:
    """Nodes that share memory with the target of a write."""
    memory = {m for call in nodes for n in targets_of(call) for m in memories(n.out)}
    return frozenset(n.index for n in nodes if not memory.isdisjoint(memories(n.out)))


def _seen_elsewhere(nodes: tuple[Node, ...], leaving: set[int]) -> frozenset[int]:
    """Calls in place after which some other tensor with the same memory is read, or may be."""
    calls = [node for node in nodes if node.inplace]
    if not calls:
        return frozenset()
    last_read = {source.index: node.index for node in nodes for source in node.inputs()}
    last_read.update(dict.fromkeys(leaving, len(nodes)))
    sharing: dict[int, list[Node]] = {}
    for node in nodes:
        for memory in memories(node.out):
            sharing.setdefault(memory, []).append(node)
    found = []
    for call in calls:
        target = next(call.inputs())
        others = [
            node
            for memory in set(memories(target.out))
            for node in sharing[memory]
            if node.index < call.index and not (call.out is None and node is target)
        ]
        outside = any(node.op in (INPUT, PARAMETER, CONSTANT) for node in (*others, target))
        unknown = not isinstance(target.out, Spec) or not target.out.memory
        later = any(last_read.get(node.index, -1) > call.index for node in others)
        if outside or unknown or later:
            found.append(call.index)
    return frozenset(found)


def targets_of(node: Node) -> Iterator[Node]:
    """The tensors that a call may write into."""
    if node.inplace or node.kwargs.get("inplace") or node.op in MAY_WRITE_BY_A_FLAG:
        yield from instances(Node, (node.args[:1], node.kwargs))
    if node.op in WRITES_STATISTICS:
        yield from instances(Node, (node.args[1:], node.kwargs))
    yield from instances(Node, node.kwargs.get("out"))


def memories(out: Any) -> Iterator[int]:
    """The known memory behind the result of a call: one number for each tensor that has one."""
    return (spec.memory for spec in instances(Spec, out) if spec.memory)


def _small(out: Any) -> bool:
    """A result whose values may be worked out: tensors alone, none of them large."""
    specs = list(instances(Spec, out))
    sizes = (torch.Size(spec.shape).numel() for spec in specs)
    return bool(specs) and all(size <= MAX_CONSTANT for size in sizes)


_OURS = (str(Path(__file__).parent) + "/", nested.__file__)
_INTERNAL = (str(Path(torch.__file__).parent) + "/", *_OURS)


def is_internal(file: str) -> bool:
    """Whether a source file is torch's or ours, or no file at all."""
    return file.startswith((*_INTERNAL, "<"))


def user_frame(depth: int = 1) -> str:
    """ "file.py:line" of the innermost frame that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None:
        if not is_internal(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def torch_is_called_by_users() -> bool:
    """Whether the call of torch's that is being looked at was made by code that is not torch's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return frame is not None and not is_internal(frame.f_code.co_filename)
