"""From a front end's torch.fx graph to the neutral Trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from enorm_fx.errors import TraceError
from enorm_fx.tracing.op_keys import in_order, op_key
from enorm_fx.tracing.op_traits import gives_the_same_values
from enorm_fx.tracing.trace import CONSTANT, INPUT, PARAMETER, Node, Spec, Trace

PIECE_KEY = "piece"


def PIECE(value: Any, index: Any) -> Any:
    """One element of a call that returned several tensors; its own op in the neutral trace."""
    return value[index]


def normalize(
    graph: fx.Graph,
    outputs: list[tuple[fx.Node, str]],
    aliases: dict[str, tuple[str, ...]],
    tied: dict[str, str],
    front_end: str,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    notes: tuple[str, ...] = (),
) -> Trace:
    """Neutral nodes for everything that an output, or a write in place, depends on."""
    wanted = _needed(graph, [node for node, _ in outputs])
    made: dict[fx.Node, Node] = {}
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node in wanted:
            made[node] = _neutral(node, made, counts)
    return Trace(
        nodes=tuple(made.values()),
        outputs=tuple((made[node], how) for node, how in outputs),
        aliases=aliases,
        tied=tied,
        front_end=front_end,
        inputs=inputs,
        notes=notes,
    )


def _needed(graph: fx.Graph, outputs: list[fx.Node]) -> set[fx.Node]:
    wanted: set[fx.Node] = set()
    writes = [n for n in graph.nodes if n.op == "call_function" and op_key(n.target)[1]]
    stack = outputs + writes
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            stack.extend(node.all_input_nodes)
    return wanted


def _neutral(node: fx.Node, made: dict[fx.Node, Node], counts: dict[str, int]) -> Node:
    if node.op == "placeholder":
        return Node(len(made), INPUT, (), {}, _spec_of(node), node.meta["name"])
    if node.op == "get_attr":
        real = node.meta.get("real")
        is_parameter = node.target == PARAMETER
        return Node(
            len(made),
            PARAMETER if is_parameter else CONSTANT,
            (),
            {},
            _spec_of(node),
            node.meta["name"] if is_parameter else "constant",
            compute=None if is_parameter else (lambda: real),
        )
    key, inplace = op_key(node.target)
    if node.target is PIECE:
        key = PIECE_KEY
    counts[key] = counts.get(key, 0) + 1
    return Node(
        len(made),
        key,
        map_nodes(in_order(node.target, node.args), made),
        map_nodes(node.kwargs, made),
        _spec_of(node),
        f"{key}_{counts[key]}",
        inplace=inplace,
        module=node.meta.get("module", ""),
        source=node.meta.get("source", ""),
        compute=node.target if callable(node.target) and repeatable(node.target) else None,
    )


def map_nodes(value: Any, replace: Mapping[fx.Node, Any]) -> Any:
    """Arguments of a torch.fx node with something else in place of every node."""
    return fx.node.map_arg(value, lambda node: replace[node])


def repeatable(function: Any) -> bool:
    """Whether a call on constants gives the same values each time."""
    if isinstance(function, (type, nn.Module)):  # a custom autograd function, an opaque module
        return False
    key, inplace = op_key(function)
    return not inplace and gives_the_same_values(key)


def _spec_of(node: fx.Node) -> Any:
    """As recorded, where the front end did so: a tensor may have changed its shape since."""
    return node.meta["spec"] if "spec" in node.meta else spec(node.meta["value"])


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor is what the inside of a torch.func transform (vmap, grad, ...) sees."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def spec(value: Any) -> Any:
    """Spec of a tensor, nested tuples of them for several."""
    if isinstance(value, Tensor):
        if any(isinstance(n, torch.SymInt) for n in value.shape):
            raise TraceError("the shape of a result depends on the values of a tensor")
        with torch._C.DisableTorchFunction():  # no call of the model's
            has_storage = value.layout is torch.strided and not is_transformed(value)
            memory = value.untyped_storage()._cdata if has_storage else 0
            layout = None
            if has_storage and not (value.is_contiguous() and value.storage_offset() == 0):
                layout = (tuple(value.stride()), int(value.storage_offset()))
        return Spec(tuple(int(n) for n in value.shape), value.dtype, memory, layout)
    if isinstance(value, (tuple, list)):
        return tuple(spec(item) for item in value)
    return None
