"""Which BatchNorm may be folded into which layer: what a trace proves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from enorm_fx.nested import instances, replaced
from enorm_fx.tracing import Node, Spec, Trace
from enorm_fx.tracing.trace import CONSTANT, PARAMETER

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
# How many axes the result of an op has where the second one, which BatchNorm normalizes, is that
# of the layer's outputs.
_AXES = {
    "linear": 2, "conv1d": 3, "conv2d": 4, "conv3d": 5,
    "conv_transpose1d": 3, "conv_transpose2d": 4, "conv_transpose3d": 5,
}  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class NotFoldedError(Exception):
    """Why a BatchNorm is left alone."""


class Calls:
    """Who calls what in a trace, and who reads it.

    modules: path -> module, under its first name.
    """

    def __init__(self, model: nn.Module, traced: Trace) -> None:
        self.modules = dict(model.named_modules())
        self._trace = traced
        self._names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(id(module), []).append(name)
        self._readers: dict[int, list[Node]] = {}
        self._made_by: dict[str, list[Node]] = {}
        for node in traced.nodes:
            self._made_by.setdefault(node.module, []).append(node)
            for source in node.inputs():
                self._readers.setdefault(source.index, []).append(node)
        self._parameters = {n.name: n for n in traced.nodes if n.op == PARAMETER}
        self._leaving = {node.index for node, _ in traced.outputs}

    def layer_before(self, path: str, batchnorm: nn.Module) -> str:
        """The path of the layer that this BatchNorm can be folded into. Raises NotFoldedError."""
        if type(batchnorm) not in BATCHNORMS:
            raise NotFoldedError(f"its class {type(batchnorm).__name__} is not torch's own")
        self._check_plain(path, batchnorm, "it")
        if batchnorm.training:
            raise NotFoldedError("it is in training mode: call eval() first")
        if batchnorm.running_mean is None or batchnorm.running_var is None:
            raise NotFoldedError("it keeps no running statistics")
        calls = [n for n in self._made_by.get(path, ()) if n.op == "batch_norm"]
        if not calls:
            raise NotFoldedError("it is not called for these inputs")
        end = self._trace.shown or len(self._trace.nodes)
        if any(call.index < end and _argument(call, 5, "training") is not False for call in calls):
            raise NotFoldedError("the model calls it in training mode")
        for leaf in {n for call in calls for n in call.inputs() if n.op in (PARAMETER, CONSTANT)}:
            if any(reader not in calls for reader in self._readers[leaf.index]):
                raise NotFoldedError("its parameters or statistics are read elsewhere as well")
        self._check_untied(path, batchnorm, "its")
        if batchnorm.weight is None and self._trace.cut:  # a gamma would be tied
            raise NotFoldedError("it may be called again where the trace has ended")
        sources = [call.args[0] for call in calls]
        layer = self._only_layer(sources)
        module = self.modules[layer]
        self._check_plain(layer, module, f"'{layer}'")
        self._check_untied(layer, module, f"the '{layer}' before it: its")
        self._check_read_by(layer, sources, calls)
        if any(len(source.out.shape) != _AXES[source.op] for source in sources):
            raise NotFoldedError(
                f"it normalizes another axis than that of the outputs of '{layer}'"
            )
        return layer

    def _only_layer(self, sources: list[Node]) -> str:
        """The one module whose layer makes all of these."""
        for source in sources:
            module = self.modules.get(source.module)
            if source.op not in _AXES or not isinstance(module, LAYERS):
                what = f"the result of '{source.op}'" if source.args else f"an {source.op}"
                raise NotFoldedError(f"it reads {what}, not that of a layer")
        layers = {source.module for source in sources}
        if len(layers) > 1:
            raise NotFoldedError(f"it reads the results of {', '.join(sorted(layers))}")
        return layers.pop()

    def _check_plain(self, path: str, module: nn.Module, what: str) -> None:
        """Nothing but torch's own forward runs, and the module has one name."""
        changed = changes_of_forward(module)
        if changed:
            raise NotFoldedError(f"{what} has {changed}")
        others = [name for name in self._names[id(module)] if name != path]
        if others:
            raise NotFoldedError(f"{what} is the module '{others[0]}' too")

    def _check_untied(self, path: str, module: nn.Module, whose: str) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            full = named(path, name)
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                raise NotFoldedError(f"{whose} {name} is no plain floating-point parameter")
            if self._trace.aliases.get(full, ("another name",)):
                raise NotFoldedError(f"{whose} {name} is shared with another module")
            if full in self._trace.tied:
                raise NotFoldedError(f"{whose} {name}: {self._trace.tied[full]}")
            if parameter.is_meta:
                raise NotFoldedError(f"{whose} {name} has no values: it is on the meta device")
            if parameter.is_inference():
                raise NotFoldedError(f"{whose} {name} was made in inference mode")

    def _check_read_by(self, layer: str, sources: list[Node], calls: list[Node]) -> None:
        """The layer's results are read by the BatchNorm alone, its parameters by these calls."""
        for source in sources:
            readers = self._readers[source.index]
            if source.index in self._leaving or any(r not in calls for r in readers):
                raise NotFoldedError(f"what '{layer}' gives is used elsewhere as well")
        for position, name in enumerate(("weight", "bias"), start=1):
            node = self._parameters.get(named(layer, name))
            if any(_argument(source, position, name) is not node for source in sources):
                raise NotFoldedError(f"'{layer}' computes with something else than its {name}")
            if node is not None and any(r not in sources for r in self._readers[node.index]):
                raise NotFoldedError(f"the {name} of '{layer}' is read elsewhere as well")
            if node is not None and node.index in self._leaving:
                raise NotFoldedError(f"the {name} of '{layer}' leaves the model")


def changes_of_forward(module: nn.Module) -> str:
    """What else than its class's forward runs when a module is called; empty if nothing does."""
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "hooks"
    return "a forward of its own" if "forward" in module.__dict__ else ""


def _argument(call: Node, position: int, name: str) -> Any:
    """An argument of a call, by place or by name; None where there is none."""
    placed = call.args[position] if position < len(call.args) else None
    return call.kwargs.get(name, placed)


def difference(before: Trace, after: Trace, gone: set[str], new_biases: set[str]) -> str:
    """What a model does besides its folded layers, then and now; empty if it is the same.

    gone: paths of the BatchNorms that are no longer there.
    new_biases: paths of the layers before them that have a bias since, which they must read.
    """
    # In training a BatchNorm alone may make the difference between two runs that are joined.
    first = list(dict.fromkeys(_runs(before, gone, new_biases)))
    second = list(dict.fromkeys(_runs(after, gone, set())))
    for one, other in zip(first, second, strict=False):
        for old, new in zip(one, other, strict=False):
            if old != new:
                return f"'{old[0]}' in '{old[1]}', then '{new[0]}' in '{new[1]}'"
        if len(one) != len(other):
            return f"{len(one)} calls, then {len(other)}"
    return "" if len(first) == len(second) else f"{len(first)} ways, then {len(second)}"


def _runs(traced: Trace, gone: set[str], with_bias: set[str]) -> Iterator[tuple[Any, ...]]:
    """For each run that was joined every call outside of the folded modules: op, module, all that
    it is given, what it gives."""
    ends = (*traced.starts[1:], len(traced.nodes))
    known: dict[int, str] = {}  # index of a node -> what both traces know it by
    for start, end in zip(traced.starts, ends, strict=True):
        run = list(_wiring(traced.nodes[start:end], known, gone, with_bias))
        left = [(known[n.index], how) for n, how in traced.outputs if start <= n.index < end]
        yield (*run, ("outputs", "", repr(left), ""))


def _wiring(
    nodes: Sequence[Node], known: dict[int, str], gone: set[str], with_bias: set[str]
) -> Iterator[tuple[str, ...]]:
    """The calls of one run; `known` is added to."""
    count = 0
    for node in nodes:
        if node.op == PARAMETER:
            known[node.index] = f"parameter {node.name}"
        elif node.op == CONSTANT:
            value = id(node.compute()) if node.compute is not None else ""
            known[node.index] = f"constant {_shapes(node)} {value}"
        elif node.module in gone:
            if node.op == "batch_norm":
                known[node.index] = known[node.args[0].index]
        else:
            known[node.index] = f"result {count}"
            count += 1
            args, kwargs = replaced(Node, (node.args, node.kwargs), lambda n: known[n.index])
            if node.module in with_bias and node.op in _AXES:
                bias = f"parameter {named(node.module, 'bias')}"
                args = (*args[:2], bias, *args[3:])
            yield node.op, node.module, repr((args, kwargs)), _shapes(node)


def _shapes(node: Node) -> str:
    return repr([(spec.shape, spec.dtype) for spec in instances(Spec, node.out)])


def named(path: str, name: str) -> str:
    """The name of a parameter of the module at a path."""
    return f"{path}.{name}" if path else name
