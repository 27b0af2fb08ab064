"""Run the rules over a trace: every tensor gets a label, every join its equations."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from enorm_fx.errors import RuleError
from enorm_fx.nested import instances, replaced
from enorm_fx.rules.moves import parts_read
from enorm_fx.rules.registry import Context, Entry, Origin, Rule, as_entry, bind, find
from enorm_fx.symmetry.labels import Label, LabelTerm, System
from enorm_fx.tracing.op_traits import CHANGES_THE_VIEW, GIVES_ZEROS, READS_MEMORY
from enorm_fx.tracing.trace import CONSTANT, INPUT, PARAMETER, Node, Spec, Trace, memories

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """What the rules found, before the equations are solved.

    values:     by node index: the label of its result (nested tuples for several).
    parameters: label of each parameter that some call reads.
    origins:    reasons, by the `origin` index of the equations.
    ignored:    label terms that some parameter or statistic does not follow.
    pinned_at:  node index -> origin, for results that keep their values.
    """

    system: System
    values: list[Any]
    parameters: dict[str, Label]
    origins: list[Origin]
    ignored: list[tuple[LabelTerm, ...]]
    pinned_at: dict[int, int]


def propagate(
    trace: Trace,
    *,
    batchnorm: str = "skip",
    biases: str = "rescale",
    frozen: frozenset[str] = frozenset(),
    free: bool = False,
    custom: Mapping[str, Rule] | None = None,
) -> Labels:
    """Labels of a whole trace.

    frozen: parameters that must keep their values.
    custom: rules by op key, for modules that were recorded as one call.
    free:   leave inputs and outputs unpinned, one variable per entry (the law that tests rules
            needs this).
    """
    context = Context(trace, System(), batchnorm, biases, parts=parts_read(trace))
    entries = {key: as_entry(rule) for key, rule in (custom or {}).items()}
    values: list[Any] = []
    for node in trace.nodes:
        context.node = node
        context.because(f"'{node.op}' ties the scales of what it touches")
        label = _label(context, node, values, free, entries)
        values.append(_decided(context, node, label) if node.index in trace.written else label)
    if not free:
        for node, how in trace.outputs:
            for label in instances(Label, values[node.index]):
                context.node = node
                context.pin(context.known(label), how)
    for name, label in context.parameters.items():
        context.node = trace.nodes[label.node]
        if name in frozen:
            context.pin(label, "the parameter is frozen (requires_grad=False)")
        elif name in trace.tied:
            context.pin(label, trace.tied[name])
        elif name in context.kept:
            context.pin(label, context.kept[name])
    return Labels(
        context.system,
        values,
        context.parameters,
        context.origins,
        context.ignored,
        context.pinned_at,
    )


def _label(
    context: Context, node: Node, values: list[Any], free: bool, custom: dict[str, Entry]
) -> Any:
    if node.op == INPUT:
        return _input(context, node, free)
    if node.op in (PARAMETER, CONSTANT):
        return Label(node.out.shape, node=node.index)
    entry = custom.get(node.op) or find(node.op)
    if entry is not None and not _writes_elsewhere(node):
        try:
            arguments = bind(entry, context, node)
        except TypeError:
            return _unknown(context, node, values, "a call of '{}' that its rule does not fit")
        label = _apply(context, entry, arguments, values)
        if node.op in custom:
            _keep_untouched(context, node)
        if label is not NotImplemented:
            return _checked(context, node, label, values)
        return _unknown(context, node, values, "'{}' with these arguments has no rule")
    elsewhere = "'{}' writes its result into a tensor that it is given (out=)"
    return _unknown(
        context, node, values, "no rule knows the op '{}'" if entry is None else elsewhere
    )


def _keep_untouched(context: Context, node: Node) -> None:
    """Parameters that a user's rule gives no label keep their values wherever they are read."""
    for source in node.inputs():
        if source.op == PARAMETER and source.name not in context.parameters:
            reason = f"the rule of '{node.op}' gives it no label"
            context.keep(Label(source.out.shape, node=source.index), reason)


def _writes_elsewhere(node: Node) -> bool:
    return node.kwargs.get("out") is not None


def _apply(context: Context, entry: Entry, call: inspect.BoundArguments, values: list[Any]) -> Any:
    for name, argument in call.arguments.items():
        accepts_new = name in entry.weights

        def label_of(node: Node, accepts_new: bool = accepts_new) -> Any:
            value = values[node.index]
            if node.op == PARAMETER:
                value = context.parameters.get(node.name, value)
                return value if accepts_new else context.known(value)
            return _constant(context, node, value)

        call.arguments[name] = replaced(Node, argument, label_of)
    return entry.function(*call.args, **call.kwargs)


def _constant(context: Context, node: Node, value: Any) -> Any:
    """Calls on constants alone give constants, whose values a rule may ask for."""
    if isinstance(value, Label) and not value.terms and value.node < 0 and not value.wild:
        return Label(value.shape, node=node.index)
    return value


def _input(context: Context, node: Node, free: bool) -> Label:
    if node.out.dtype not in _FLOATING:
        return Label(node.out.shape)
    if free:
        return Label(node.out.shape, (LabelTerm(1, context.system.fresh(*node.out.shape)),))
    return context.pinned(node.out.shape, f"{node.name} of the model")


def _unknown(context: Context, node: Node, values: list[Any], reason: str) -> Any:
    """Never guess: all that an unknown op touches keeps its values."""
    text = reason.format(node.op)
    sources = list(node.inputs())
    if node.op in READS_MEMORY:  # also beside the entries of the tensor that it is given
        memory = {m for source in sources for m in memories(source.out)}
        nodes = context.trace.nodes[: node.index]
        sources += [n for n in nodes if not memory.isdisjoint(memories(n.out))]
    for source in sources:
        for label in instances(Label, values[source.index]):
            context.pin(context.known(label), text)
    return replaced(Spec, node.out, lambda spec: context.pinned(spec.shape, text))


def _checked(context: Context, node: Node, label: Any, values: list[Any]) -> Any:
    if isinstance(node.out, Spec) and isinstance(label, Label):
        if label.shape != node.out.shape:
            raise RuleError(
                f"the rule for '{node.op}' gave a label of shape {label.shape} to a result of "
                f"shape {node.out.shape} ({node.module} {node.source})"
            )
        if label.terms and node.out.dtype not in _FLOATING:
            return _unknown(context, node, values, "'{}' gives numbers that are not floating point")
    if node.inplace and node.op not in CHANGES_THE_VIEW:
        # Whatever else looks at the memory that was written sees the same label as before.
        target = values[next(node.inputs()).index]
        if label is None or node.index not in context.trace.seen_elsewhere:
            return label
        if label.wild:  # zeros fit the label that was there
            return Label(label.shape, context.known(target).terms)
        context.because(f"'{node.op}' writes in place")
        context.system.equal(context.known(label), context.known(target))
    return label


def _decided(context: Context, node: Node, label: Any) -> Any:
    """The label of a result that something is written into: zeros do not fit every label then."""
    if isinstance(label, Label) and isinstance(node.out, Spec) and node.out.dtype in _FLOATING:
        zeros = node.op in GIVES_ZEROS and not _writes_elsewhere(node)
        return context.zeros(label.shape) if zeros or label.wild else label
    return replaced(Label, label, lambda own: replace(own, wild=False) if own.wild else own)
