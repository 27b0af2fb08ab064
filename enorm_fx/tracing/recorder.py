"""Record the torch calls of one run into a torch.fx graph.

Calls on parameters alone are recorded too, so nothing that happens to a weight goes unseen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)

from enorm_fx.errors import DataDependentError, TraceError
from enorm_fx.nested import instances, replaced, tensors_anywhere
from enorm_fx.tracing.fake_results import FakeResults
from enorm_fx.tracing.fakes import Fakes, refuse_transformed
from enorm_fx.tracing.normalize import PIECE, map_nodes, repeatable, spec
from enorm_fx.tracing.op_keys import op_key
from enorm_fx.tracing.op_traits import METADATA, READS_A_BOOL, TAKES_VALUES
from enorm_fx.tracing.run import Run
from enorm_fx.tracing.trace import (
    CONSTANT,
    INPUT,
    PARAMETER,
    memories,
    torch_is_called_by_users,
    user_frame,
)
from enorm_fx.tracing.undisturbed import FOREIGN


@dataclass(frozen=True, slots=True)
class Call:
    """One call as it was made, with the very tensors that it took and gave."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    source: str


@dataclass(frozen=True, slots=True)
class AskedOfInputs:
    """A yes or no that the model reads from its inputs alone, whatever its weights are."""

    question: Any
    answer: bool
    source: str


@dataclass(frozen=True, slots=True)
class Raised:
    """In the place of a result: what a call raised."""

    kind: type[Exception]
    message: str

    def error(self) -> Exception:
        """The same again."""
        try:
            return self.kind(self.message)
        except TypeError:  # it wants other arguments
            return RuntimeError(self.message)


class Recorder(Run):
    """Builds a graph of the calls of a run, and keeps them to compare other runs with.

    Tensors are known by identity; every tensor that was seen is kept alive, so that no
    identity is used twice.

    calls: what was called, in order. A call that ended the run because its result depends on data
        is the last one.
    failure: why the run cannot be traced, even if the model went on.
    asked_of_inputs: what the model asked of its inputs, each question once.
    answers: what the first of those questions are answered.
    changes_shapes: some call changed the shape of a tensor in place, so results are not what they
        were when they were given.
    """

    def __init__(
        self,
        model: nn.Module,
        opaque: tuple[type[nn.Module], ...] = (),
        answers: tuple[bool, ...] = (),
    ) -> None:
        super().__init__(model, opaque, Fakes(model), None)
        self.asked_of_inputs: list[AskedOfInputs] = []
        self._answers = answers
        self.graph = fx.Graph()
        self.calls: list[Call] = []
        self.failure: TraceError | None = None
        self._results = FakeResults(self.fakes.mode)
        self._implementations: dict[int, int] = {}
        self.changes_shapes = False
        self._written: dict[int, list[fx.Node]] = {}  # memory -> calls that wrote into it
        self._nodes: dict[int, fx.Node] = {}
        self._pieces: dict[int, tuple[fx.Node, tuple[Any, ...]]] = {}
        self._alive: list[Any] = []
        with self.fakes.mode:
            self._attributes = torch.empty(0).__dict__.keys() | _FAKE_ATTRIBUTES

    def input(self, tensor: Tensor, name: str) -> Tensor:
        """A fake tensor for one of the model's inputs, a placeholder of the graph."""
        fake = self.fakes.mode.from_tensor(tensor.detach())
        node = self.graph.create_node("placeholder", INPUT)
        node.meta = {"value": fake, "spec": spec(fake), "name": name, "real": tensor}
        self._remember(fake, node)
        return fake

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, inplace = op_key(function)
        if is_count(function, args):
            self._record(function, args, kwargs, function(*args, **kwargs))
            self.calls.pop()  # the same for a model that trains and one that does not
            return args[0]
        try:
            out = self._results.of(key, function, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            out = self._on_constants(function, args, kwargs)
            if out is NotImplemented:
                out = self._answer(key, args)
            if out is NotImplemented:
                raise self._depends_on_data(function, args, kwargs, error) from None
            out = self.fakes.of(out)
            self.calls.append(Call(function, args, kwargs, out, user_frame()))
            return out
        except FOREIGN as error:
            if key in TAKES_VALUES:  # a fake tensor has none; a real one would have given them
                raise self._depends_on_data(function, args, kwargs) from error
            again = Raised(type(error), str(error))  # the error itself holds all that was running
            self.calls.append(Call(function, args, kwargs, again, user_frame()))
            raise
        if next(tensors_anywhere(out), None) is None:
            if key in METADATA or next(tensors_anywhere((args, kwargs)), None) is None:
                return out
            if not inplace:
                raise self._depends_on_data(function, args, kwargs)
        return self._record(function, args, kwargs, out)

    def unseen(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        return self._record(target, args, kwargs, out)

    def _record(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Any:
        """Add a call to the graph; its outputs are known from here on."""
        key, inplace = op_key(function)
        taken, named = replaced(Tensor, (args, kwargs), self.node_of)
        node = self.graph.create_node("call_function", function, taken, named, key)
        for tensor in tensors_anywhere(out):
            refuse_transformed(tensor)
            if any(isinstance(n, torch.SymInt) for n in tensor.shape):
                error = DynamicOutputShapeException(function)
                raise self._depends_on_data(function, args, kwargs, error)
        if inplace:
            self._note_write(args, node)
        source = user_frame()
        module = self.modules[-1] if self.modules else ""
        node.meta = {"value": out, "spec": spec(out), "module": module, "source": source}
        self.calls.append(Call(function, args, kwargs, out, source))
        if isinstance(out, Tensor):
            self._remember(out, node)
        else:
            self._remember_pieces(out, node, ())
        return out

    def _note_write(self, args: tuple[Any, ...], call: fx.Node) -> None:
        """A call wrote into its first argument."""
        for tensor in instances(Tensor, args[:1]):
            for memory in memories(spec(tensor)):
                self._written.setdefault(memory, []).append(call)
            before = self.node_of(tensor).meta["spec"]
            self.changes_shapes |= before is None or before.shape != tuple(tensor.shape)

    def knows(self, tensor: Tensor) -> bool:
        """Whether the tensor has a part in the run: an input, a parameter, the result of a call."""
        known = id(tensor) in self._nodes or id(tensor) in self._pieces
        return known or self.fakes.name(tensor) is not None

    def forget_attributes(self) -> None:
        """Take away what the model's code has attached to tensors: another run attaches it anew."""
        for tensor in self._alive:
            attached = tensor.__dict__.keys() - self._attributes
            for name in attached:
                del tensor.__dict__[name]

    def alive(self) -> list[fx.Node]:
        """The nodes whose tensors someone else still holds. Nothing can be recorded after this."""
        for tensor in self._alive:
            if id(tensor) in self._pieces:
                self.node_of(tensor)
        held = [(weakref.ref(t), self._nodes[id(t)]) for t in self._alive if id(t) in self._nodes]
        for node in self.graph.nodes:
            node.meta.pop("value", None)
        self.fakes.clear()
        del tensor
        for keeper in (self._alive, self._nodes, self._pieces, self.calls, self.read_inside):
            keeper.clear()
        return [node for reference, node in held if reference() is not None]

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that gave a tensor; parameters and constants become nodes when first met."""
        node = self._nodes.get(id(tensor))
        if node is not None and self._implementations[id(tensor)] == tensor._cdata:
            return node
        if node is not None:
            raise TraceError(f"{self.where()}: a tensor was exchanged (torch.utils.swap_tensors)")
        if id(tensor) in self._pieces:
            return self._piece(tensor)
        if self.fakes.real(tensor) is not None:
            name = self.fakes.name(tensor)
            node = self.graph.create_node("get_attr", CONSTANT if name is None else PARAMETER)
            node.meta = {
                "value": tensor,
                "spec": spec(tensor),
                "name": name or "",
                "real": self.fakes.value(tensor),
            }
            self._remember(tensor, node)
            return node
        raise TraceError(
            f"{self.where()}: a tensor of shape {tuple(tensor.shape)} was made by code that does "
            "not show in torch's function protocol (scripted or compiled code, or an extension). "
            "Replace that part by the Python module it was made from"
        )

    def _piece(self, tensor: Tensor) -> fx.Node:
        node, path = self._pieces[id(tensor)]
        value = node.meta["value"]
        for step in path:
            outer, value = node, value[step]
            node = self.graph.create_node("call_function", PIECE, (outer, step))
            node.meta = {**outer.meta, "value": value, "spec": spec(value)}
        self._remember(tensor, node)
        return node

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = node
        self._implementations[id(tensor)] = tensor._cdata
        self._pieces.pop(id(tensor), None)
        self._alive.append(tensor)

    def _remember_pieces(self, out: Any, node: fx.Node, path: tuple[Any, ...]) -> None:
        if isinstance(out, Tensor):
            self._nodes.pop(id(out), None)
            self._pieces[id(out)] = (node, path)
            self._alive.append(out)
        elif isinstance(out, (tuple, list)):
            for i, item in enumerate(out):
                self._remember_pieces(item, node, (*path, i))

    def _on_constants(self, function: Any, args: Any, kwargs: Any) -> Any:
        """The call on real values, where no input and no parameter has a part in them."""
        with torch._C.DisableTorchFunction(), unset_fake_temporarily():
            tensors = instances(Tensor, (args, kwargs))
            values = {id(t): self._constant(self.node_of(t)) for t in tensors}
            if any(value is None for value in values.values()):
                return NotImplemented
            args, kwargs = replaced(Tensor, (args, kwargs), lambda t: values[id(t)])
            return function(*args, **kwargs)

    def _constant(self, node: fx.Node, with_inputs: bool = False) -> Tensor | None:
        """The value of a node that depends on constants alone; None for any other.

        with_inputs: the example inputs count as constants.
        """
        if self._was_written(node):
            return None
        if node.op == "get_attr" or (node.op == "placeholder" and with_inputs):
            real: Tensor | None = node.meta["real"]
            return real
        if not callable(node.target) or not repeatable(node.target):
            return None
        inputs = {n: self._constant(n, with_inputs) for n in node.all_input_nodes}
        if any(value is None for value in inputs.values()):
            return None
        args, kwargs = map_nodes((node.args, node.kwargs), inputs)
        value: Tensor = node.target(*args, **kwargs)
        return value

    def _answer(self, key: str, args: tuple[Any, ...]) -> Any:
        """A yes or no about the inputs: as it was to be answered, or as the example has it.

        NotImplemented for anything else, and for what depends on a parameter.
        """
        tensor = args[0] if args else None
        if key not in READS_A_BOOL or not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
            return NotImplemented
        node = self.node_of(tensor)
        question = self._question(node)
        if question is None:
            return NotImplemented
        for asked in self.asked_of_inputs:
            if asked.question == question:
                return asked.answer
        if len(self.asked_of_inputs) < len(self._answers):
            answer = self._answers[len(self.asked_of_inputs)]
        else:
            with torch._C.DisableTorchFunction(), unset_fake_temporarily():
                value = self._constant(node, with_inputs=True)
                answer = value is not None and not value.is_meta and bool(value)
        self.asked_of_inputs.append(AskedOfInputs(question, answer, user_frame()))
        return answer

    def _was_written(self, node: fx.Node) -> bool:
        return any(memory in self._written for memory in memories(node.meta["spec"]))

    def _question(self, node: fx.Node) -> Any:
        """What is asked, to recognize it; None where it depends on a parameter.

        The same computation of the same inputs is the same question, unless something was written
        into what it reads.
        """
        seen: set[fx.Node] = set()
        todo = [node]
        while todo:
            part = todo.pop()
            if part not in seen:
                if part.target == PARAMETER:
                    return None
                seen.add(part)
                todo += part.all_input_nodes
                for memory in memories(part.meta["spec"]):
                    todo += self._written.get(memory, [])
        return node if any(map(self._was_written, seen)) else self._expression(node)

    def _expression(self, node: fx.Node) -> Any:
        if node.op != "call_function":
            return node
        args, kwargs = map_nodes(
            (node.args, node.kwargs), {n: self._expression(n) for n in node.all_input_nodes}
        )
        return (node.target, repr(args), repr(kwargs))

    def _depends_on_data(
        self, function: Any, args: Any, kwargs: Any, error: Exception | None = None
    ) -> TraceError:
        shape = isinstance(error, DynamicOutputShapeException)
        what = "gives a result whose shape depends on" if shape else "reads into Python"
        kind: Callable[[str], TraceError] = DataDependentError if shape else TraceError
        source = user_frame()
        self.calls.append(Call(function, args, kwargs, None, source))
        self.failure = kind(
            f"{self.where()}: '{op_key(function)[0]}' at {source or 'an unknown line'} {what} the "
            "values of a tensor. Analyze the part of the model before this call"
        )
        return self.failure


def is_count(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether torch's own layer counts its calls in a buffer, as BatchNorm does while it trains."""
    if op_key(function) != ("add", True) or torch_is_called_by_users():
        return False
    return isinstance(args[0], Tensor) and args[0].dtype == torch.int64 and not args[0].ndim


_FAKE_ATTRIBUTES = frozenset(FakeTensor.__annotations__) | {"_is_param"}
