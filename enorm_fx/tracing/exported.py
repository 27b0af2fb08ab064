"""Front end "export": the graph that torch.export gives, as a Trace."""

from __future__ import annotations

import io
import operator
import re
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind, OutputKind

from enorm_fx.errors import TraceError
from enorm_fx.nested import replaced
from enorm_fx.tracing.differences import Difference, first_difference
from enorm_fx.tracing.inputs import Call, shapes_of
from enorm_fx.tracing.modes import Mode
from enorm_fx.tracing.normalize import PIECE, normalize
from enorm_fx.tracing.parameters import Parameters
from enorm_fx.tracing.trace import CONSTANT, INPUT, PARAMETER, Trace, is_internal
from enorm_fx.tracing.undisturbed import FOREIGN, quiet


class ExportRecording:
    """What torch.export made of one call of a model. Raises TraceError."""

    modes = frozenset({"grad"})
    asked = ()

    def __init__(self, model: nn.Module, call: Call) -> None:
        self._model = model
        self._call = call
        self._trace = trace_export(model, call)

    def again(self, asked: set[str] | None = None) -> Difference | None:
        """Export once more: where the graphs differ."""
        self._go_on()
        try:
            return first_difference(self._trace, trace_export(self._model, self._call))
        except TraceError as error:
            return Difference("a run to its end", f"one in which {error}")

    def _go_on(self) -> None:
        """One call that leaves the model's numbers as a call does: torch.export puts them back."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        args, kwargs = replaced(Tensor, self._call, lambda t: mode.from_tensor(t.detach()))
        with quiet(self._model), mode, suppress(*FOREIGN):
            self._model(*args, **kwargs)

    def trace(self) -> Trace:
        """The graph as a Trace."""
        return self._trace


def trace_export(model: nn.Module, call: Call) -> Trace:
    """Trace one call of the model as it stands. Raises TraceError."""
    args, kwargs = call
    parameters = Parameters(model)
    try:
        # torch.export prints the graph that it had got to; our error says what matters.
        with (
            quiet(model),
            Mode(grad=torch.is_grad_enabled()).entered(model),  # export knows no other
            redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            # Activations that the model keeps are not in the graph: they would be rescaled unseen.
            warnings.filterwarnings("error", "The tensor attribute", UserWarning)
            program = torch.export.export(model, args, kwargs or None, strict=False)
    except (*FOREIGN, UserWarning) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise TraceError(
            f"torch.export raised {type(error).__name__}: {first} for inputs {shapes_of(call)}"
        ) from error
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    parts: dict[fx.Node, str] = {}
    sources = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            nodes[node] = _leaf(graph, node, sources[node.name], program, parameters)
        elif node.op == "get_attr":
            parts[node] = str(node.target)  # the graph of a branch: no rule looks into it
        elif node.op == "call_function":
            nodes[node] = _call(graph, node, {**nodes, **parts} if parts else nodes)
    outputs = _outputs(program, nodes)
    if not outputs:
        raise TraceError("the model returned no tensor that its inputs or parameters reach")
    return normalize(
        graph,
        outputs=outputs,
        aliases=parameters.aliases,
        tied=parameters.tied,
        front_end="export",
        inputs=(args, kwargs),
    )


def _leaf(
    graph: fx.Graph, node: fx.Node, spec: Any, program: Any, parameters: Parameters
) -> fx.Node:
    """An input, a parameter under its first name, or a constant with its value."""
    value = node.meta.get("val")
    if spec.kind == InputKind.USER_INPUT:
        made = graph.create_node("placeholder", INPUT, name=node.name)
        made.meta = {"value": value, "name": f"input '{node.name}'"}
        return made
    is_parameter = spec.kind == InputKind.PARAMETER
    made = graph.create_node("get_attr", PARAMETER if is_parameter else CONSTANT)
    if is_parameter:
        parameter = program.state_dict[spec.target]
        made.meta = {"value": value, "name": parameters.name(parameter) or spec.target}
    else:
        real = program.state_dict.get(spec.target, program.constants.get(spec.target))
        if isinstance(real, Tensor):
            parameters.meet(real)
        if spec.kind == InputKind.BUFFER and real is not None and real.is_floating_point():
            real = None  # it may hold other numbers tomorrow
        made.meta = {"value": value, "name": "", "real": real}
    return made


def _call(graph: fx.Graph, node: fx.Node, nodes: Mapping[fx.Node, Any]) -> fx.Node:
    target = PIECE if node.target is operator.getitem else node.target
    made = graph.create_node(
        "call_function",
        target,
        fx.node.map_arg(node.args, nodes.__getitem__),
        fx.node.map_arg(node.kwargs, nodes.__getitem__),
    )
    made.meta = {
        "value": node.meta.get("val"),
        "module": _module(node),
        "source": _source(node.meta.get("stack_trace") or ""),
    }
    return made


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.removeprefix("L['self']").lstrip(".")


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def _source(trace: str) -> str:
    """ "file.py:line" of the innermost frame that is neither torch's nor ours."""
    found = ""
    for match in _FRAME.finditer(trace):
        if not is_internal(match["file"]):
            found = f"{match['file']}:{match['line']}"
    return found


def _outputs(program: Any, nodes: dict[fx.Node, fx.Node]) -> list[tuple[fx.Node, str]]:
    """The user's outputs, and what is written into buffers and inputs."""
    by_name = {node.name: made for node, made in nodes.items()}
    result = []
    for spec in program.graph_signature.output_specs:
        made = by_name.get(getattr(spec.arg, "name", None) or "")
        if made is not None:
            kept = spec.kind != OutputKind.USER_OUTPUT
            how = f"kept by the model as '{spec.target}'" if kept else "output of the model"
            result.append((made, how))
    return [(made, how) for made, how in result if isinstance(made.meta["value"], Tensor)]
