"""Where rules are kept, and what a rule gets to work with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from enorm_fx.errors import RuleError
from enorm_fx.symmetry.labels import Label, LabelTerm, System, combine
from enorm_fx.tracing.trace import Node, Spec, Trace

Rule = Callable[..., Any]

# Ids are written out in full only up to this size.
MAX_IDS = 1 << 26

# Zeros that are written into have a variable for each entry up to this size.
_MOST_ZEROS = 1 << 16


class Flow(Enum):
    """How the entries of operands get into a result, where that is as simple as this."""

    PASSES = "each entry is made of the operand's at the same place, and zero stays zero"
    ENTRIES = "each entry is made of the operands' at the same place"
    PRODUCT = "each entry is the product of the operands' at the same place"
    SUM = "each entry is one of the operands' at the same place, or made of their sum"
    MOVES = "entries are moved; the rule does nothing else to ids"


@dataclass(frozen=True, slots=True)
class Entry:
    """A rule and how it is called.

    weights: names of the arguments that the rule may receive as parameters without a label,
             to give them one.
    flow:    where entries go, which tells what reaches an output; None: anywhere.
    """

    function: Rule
    signature: inspect.Signature
    weights: frozenset[str]
    flow: Flow | None = None


_RULES: dict[str, Entry] = {}

# torch's documentation, its methods and its ATen schemas name the same argument differently.
_ARGUMENT_SYNONYMS = {
    "self": "input", "axis": "dim", "x1": "input", "x2": "other", "axes": "dims",
    "mat_a": "input", "mat_b": "mat2",
}  # fmt: skip


def rule(
    *keys: str, weights: Sequence[str] = (), flow: Flow | None = None
) -> Callable[[Rule], Rule]:
    """Register a function as the rule for neutral op keys. A key has one rule."""

    def register(function: Rule) -> Rule:
        entry = Entry(function, inspect.signature(function), frozenset(weights), flow)
        for key in keys:
            if key in _RULES:
                raise RuleError(f"op '{key}' already has the rule {_RULES[key].function.__name__}")
            _RULES[key] = entry
        return function

    return register


def as_entry(function: Rule) -> Entry:
    """A user's rule for a module: every argument may be a parameter without a label."""
    signature = inspect.signature(function)
    return Entry(function, signature, frozenset(signature.parameters))


def find(key: str) -> Entry | None:
    """The rule for an op key, None where there is none."""
    return _RULES.get(key)


def table() -> dict[str, Entry]:
    """Every op key with its rule: the op coverage."""
    return dict(sorted(_RULES.items()))


def bind(entry: Entry, context: Context, node: Node) -> inspect.BoundArguments:
    """A call's arguments under the rule's own names. Raises TypeError where they do not fit."""
    kwargs = {_ARGUMENT_SYNONYMS.get(name, name): value for name, value in node.kwargs.items()}
    bound = entry.signature.bind(context, *node.args, **kwargs)
    bound.apply_defaults()
    return bound


@dataclass(frozen=True, slots=True)
class Origin:
    """Why an equation was made, for the report.

    node:   module path and op of the call that made it, or the name of a parameter.
    source: "file.py:line" of the user's code that called it.
    index:  of that call's node in the trace.
    keeps:  the equation says that a tensor keeps its values, not that tensors scale alike.
    """

    reason: str
    node: str = ""
    source: str = ""
    index: int = -1
    keeps: bool = False


@dataclass(slots=True)
class Context:
    """What a rule may use: fresh variables, equations, the call's shapes, values of constants.

    out: Spec of the call's result, or a tuple of them.
    """

    trace: Trace
    system: System
    batchnorm: str = "skip"
    biases: str = "rescale"
    node: Node | None = None
    origins: list[Origin] = field(default_factory=list)
    parameters: dict[str, Label] = field(default_factory=dict)
    ignored: list[tuple[LabelTerm, ...]] = field(default_factory=list)
    pinned_at: dict[int, int] = field(default_factory=dict)  # node index -> origin
    kept: dict[str, str] = field(default_factory=dict)  # parameter -> why it keeps its values
    parts: Mapping[str, tuple[Tensor | None, ...]] = field(default_factory=dict)  # see parts_read

    @property
    def out(self) -> Any:
        return self.node.out if self.node is not None else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the call's only (or first) result."""
        out = self.out
        while isinstance(out, tuple):
            out = out[0]
        return out.shape if isinstance(out, Spec) else ()

    def because(self, reason: str, keeps: bool = False) -> None:
        """What the equations made from here on are about; `keeps`, see Origin."""
        node = self.node
        if node is None:
            origin = Origin(reason, keeps=keeps)
        else:
            is_call = node.op not in ("parameter", "constant")
            place = f"{node.module}.{node.op}".lstrip(".") if is_call else node.name
            origin = Origin(reason, place, node.source, node.index, keeps)
        self.origins.append(origin)
        self.system.origin = len(self.origins) - 1

    def value(self, label: Label) -> Tensor | None:
        """The values of a constant tensor; None for anything else."""
        if label.terms or label.node < 0:
            return None
        value = self.trace.value(self.trace.nodes[label.node])
        return None if value is None else value.cpu()

    def is_new(self, label: Label) -> bool:
        """A parameter that has no label yet: the rule that meets it first gives it one."""
        name = self.parameter_name(label)
        return name is not None and name not in self.parameters

    def parameter_name(self, label: Label) -> str | None:
        if label.node < 0 or self.trace.nodes[label.node].op != "parameter":
            return None
        return self.trace.nodes[label.node].name

    def define(self, label: Label, terms: Sequence[LabelTerm]) -> Label:
        """Give a new parameter its label."""
        name = self.parameter_name(label)
        if name is None or name in self.parameters:
            raise RuleError(f"'{name}' is no parameter without a label")
        made = Label(label.shape, combine(terms), node=label.node)
        self.parameters[name] = made
        return made

    def known(self, label: Label) -> Label:
        """The label of a tensor; a parameter that some op reads in a way of its own gets one now.

        It may scale along each of its axes: a term per axis. Where it is read in parts (one expert
        of several, the queries' rows of a packed projection), the other axes have scales for each
        part.
        """
        name = self.parameter_name(label)
        if name is None or label.terms:
            return label
        if name in self.parameters:
            return self.parameters[name]
        parts = self.parts.get(name, (None,) * len(label.shape))
        if torch.Size(label.shape).numel() > MAX_IDS:
            parts = (None,) * len(label.shape)
        terms = []
        for axis, size in enumerate(label.shape):
            if size > 1 and not self._covered(label.shape, axis, parts):
                ids = self.system.fresh(
                    *(
                        size if a == axis else 1 if p is None else int(p.max()) + 1
                        for a, p in enumerate(parts)
                    )
                )
                for a, part in enumerate(parts):
                    if part is not None and a != axis:
                        ids = ids.index_select(a, part)
                terms.append(LabelTerm(1, ids))
        return self.define(label, terms or [LabelTerm(1, self.system.fresh(*label.shape))])

    @staticmethod
    def _covered(shape: Sequence[int], axis: int, parts: Sequence[Tensor | None]) -> bool:
        """Whether each place is a part of its own: then the terms of other axes tell them apart."""
        part = parts[axis]
        others = any(n > 1 for a, n in enumerate(shape) if a != axis)
        return part is not None and int(part.max()) + 1 == shape[axis] and others

    def zeros(self, shape: Sequence[int]) -> Label:
        """The label of zeros that will be written into: what is written decides.

        A variable for each entry; in a large tensor the sum of one for each axis.
        """
        if torch.Size(shape).numel() <= _MOST_ZEROS:
            return Label(tuple(shape), (LabelTerm(1, self.system.fresh(*shape)),))
        sizes = ([n if a == axis else 1 for a in range(len(shape))] for axis, n in enumerate(shape))
        return Label(tuple(shape), tuple(LabelTerm(1, self.system.fresh(*size)) for size in sizes))

    def decided(self, label: Label) -> Label:
        """The label of a tensor that is written into. One of zeros fits any label: it gets one."""
        value = self.value(label)
        wild = label.wild or (value is not None and not bool(value.any()))
        return self.zeros(label.shape) if wild else self.known(label)

    def ignore(self, label: Label) -> None:
        """A scale that a parameter should follow and, by the caller's choice, does not."""
        if label.terms:
            self.ignored.append(label.terms)

    def keep(self, label: Label, reason: str) -> None:
        """Like pin, for a parameter that may get its label later or never."""
        name = self.parameter_name(label)
        if name is None:
            self.pin(label, reason)
        else:
            self.kept.setdefault(name, reason)

    def pin(self, label: Label, reason: str) -> None:
        """Require that a tensor keeps its values."""
        self.because(reason, keeps=True)
        self.system.pin(label)

    def pinned(self, shape: Sequence[int], reason: str) -> Label:
        """The label of a result that keeps its values; the reason is kept for the report."""
        if self.node is not None:
            self.because(reason)
            self.pinned_at.setdefault(self.node.index, self.system.origin)
        return Label(tuple(shape))
