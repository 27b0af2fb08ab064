"""Training and evaluation: a model that asks for its mode is traced in both.

A plan must hold in both modes, or a plan made while evaluating would change what is trained (an
auxiliary head that only training runs). Torch's own layers ask for the mode too, but their rules
hold in either.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import CodeType, FunctionType

import torch
from torch import nn

from enorm_fx.errors import TraceError
from enorm_fx.nested import replaced
from enorm_fx.tracing.trace import PARAMETER, Node, Spec, Trace, is_internal


def trace_both(model: nn.Module, trace: Callable[[], Trace]) -> Trace:
    """The trace of the mode that the model is in, joined by that of the other one if it matters.

    trace: traces the model in the mode that it is in when called.
    """
    first = trace()
    if not asks_for_mode(model):
        return first
    other = "evaluation" if model.training else "training"
    try:
        with _switched(model):
            second = trace()
    except TraceError as error:
        mode = "training" if model.training else "evaluation"
        why = str(error).partition(". ")[0]
        note = f"Holds in {mode} mode only: in {other} mode the model cannot be traced, {why}"
        return replace(first, notes=(*first.notes, note))
    return join(first, second)


def asks_for_mode(model: nn.Module) -> bool:
    """Whether code that is not torch's reads an attribute called `training`."""
    return any(_reads_training(kind) for kind in {type(m) for m in model.modules()})


def _reads_training(kind: type) -> bool:
    for base in kind.__mro__:
        for member in vars(base).values():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            code = getattr(function, "__code__", None)
            if code is None or is_internal(code.co_filename) or not _names_training(code):
                continue
            if not _only_passes_it_on(function):
                return True
    return False


def _only_passes_it_on(function: FunctionType) -> bool:
    """Whether `training` occurs only in calls such as F.dropout(x, training=self.training).

    The rules of torch.nn.functional hold in both modes.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return False
    harmless = {
        id(keyword.value)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and _is_functional(call.func, function)
        for keyword in call.keywords
    }
    return not any(
        isinstance(node, ast.Attribute) and node.attr == "training" and id(node) not in harmless
        for node in ast.walk(tree)
    )


def _is_functional(called: ast.expr, function: FunctionType) -> bool:
    owner = called.value if isinstance(called, ast.Attribute) else None
    known = function.__globals__.get(owner.id) if isinstance(owner, ast.Name) else None
    return known is torch.nn.functional


def _names_training(code: CodeType) -> bool:
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return "training" in code.co_names or any(_names_training(c) for c in inner)


@contextmanager
def _switched(model: nn.Module) -> Iterator[None]:
    """Every module in the mode that the model is not in; afterwards each as it was."""
    modes = [(module, module.training) for module in model.modules()]
    mode = not model.training
    try:
        for module, _ in modes:
            module.training = mode
        yield
    finally:
        for module, before in modes:
            module.training = before


def join(first: Trace, second: Trace) -> Trace:
    """Both traces over one set of parameters. The first one is what graphs show."""
    nodes = list(first.nodes)
    known = {n.name: n for n in first.nodes if n.op == PARAMETER}
    made: dict[int, Node] = {}
    for node in second.nodes:
        if node.op == PARAMETER and node.name in known:
            made[node.index] = known[node.name]
            continue
        args, kwargs = replaced(Node, (node.args, node.kwargs), lambda n: made[n.index])
        out = replaced(Spec, node.out, _elsewhere)
        copied = replace(node, index=len(nodes), args=args, kwargs=kwargs, out=out)
        made[node.index] = copied
        nodes.append(copied)
    return replace(
        first,
        nodes=tuple(nodes),
        outputs=first.outputs + tuple((made[n.index], how) for n, how in second.outputs),
        tied={**second.tied, **first.tied},
        notes=tuple(dict.fromkeys((*first.notes, *second.notes))),
        shown=len(first.nodes),
        _values={},
    )


def _elsewhere(spec: Spec) -> Spec:
    """The same spec in other memory: two runs share none, whatever the addresses say."""
    return replace(spec, memory=-spec.memory)
