"""Front end "symbolic": run the model once on fake tensors and record every torch call.

Fake tensors have shapes and no data, so Python sees real shapes and types (loops over
`x.size()`, `isinstance(x, Tensor)`, flags and `*args` need no care), nothing is computed, and
a branch on an activation's value cannot be taken: it raises. Every call that torch makes
through its function protocol is recorded into a torch.fx graph, calls on parameters alone too,
so nothing that happens to a weight goes unseen.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode

from enorm_fx.errors import DataDependentError, EnormError, TraceError
from enorm_fx.nested import instances, replaced, tensors_anywhere
from enorm_fx.tracing.after_cut import UnreadableError, reachable, running
from enorm_fx.tracing.inputs import shapes_of
from enorm_fx.tracing.normalize import PIECE, map_nodes, normalize, repeatable, spec
from enorm_fx.tracing.op_keys import METADATA, op_key
from enorm_fx.tracing.parameters import Parameters
from enorm_fx.tracing.this_thread import watched_by
from enorm_fx.tracing.trace import CONSTANT, INPUT, PARAMETER, Trace, memories, user_frame
from enorm_fx.tracing.undisturbed import FOREIGN, undisturbed


def trace_symbolic(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    opaque: tuple[type[nn.Module], ...] = (),
    cut: bool = False,
) -> Trace:
    """Trace one call of the model. Raises TraceError; the model is left as it was.

    opaque: modules of these very classes are recorded as one call each.
    cut:    where what the model does begins to depend on data, end the trace instead of raising
            DataDependentError: whatever may be used from there on keeps its values.
    """
    recorder = Recorder(model, opaque)
    notes: tuple[str, ...] = ()
    try:
        with undisturbed(model) as snapshot:
            try:
                with recorder.recording():
                    inputs = recorder.fake_inputs(args, kwargs)
                    result = model(*inputs[0], **inputs[1])
                left = [(t, "output of the model") for t in tensors_anywhere(result)]
                left += [(t, f"kept by the model as {name}") for t, name in snapshot.new_tensors()]
                left += [(t, _INSIDE) for t in recorder.read_inside]
                leaving = [(recorder.node_of(t), how) for t, how in left if recorder.knows(t)]
                del result, left, inputs  # an output that is a view would keep what it looks at
                recorder.read_inside.clear()
                if leaving:
                    leaving += recorder.held_elsewhere({node for node, _ in leaving})
            except DataDependentError as error:
                if not cut:
                    raise
                leaving = _cut(recorder, error)
                where = str(error).partition(". ")[0]
                notes = (f"The analysis ends {where}. What may be used later keeps its values.",)
    except EnormError:
        raise
    except UnsupportedOperatorException as error:
        raise TraceError(
            f"{_where(recorder)}: {error} has no shape rule (register one with "
            "torch.library.register_fake)"
        ) from error
    except FOREIGN as error:
        raise TraceError(
            f"{_where(recorder)}: the model raised {type(error).__name__}: {error} for inputs "
            f"{shapes_of((args, kwargs))}. Pass example_inputs that the model accepts"
        ) from error
    if not leaving:
        raise TraceError("the model returned no tensor that its inputs or parameters reach")
    return normalize(
        recorder.graph,
        outputs=leaving,
        aliases=recorder.parameters.aliases,
        tied=recorder.parameters.tied,
        front_end="symbolic",
        inputs=(args, kwargs),
        notes=notes,
    )


def _cut(recorder: Recorder, error: DataDependentError) -> list[tuple[fx.Node, str]]:
    """End the trace at an error: all that may be used afterwards leaves the model there."""
    reason = "it may be used after the model's path begins to depend on data"
    try:
        later = reachable(running(error.__traceback__))
    except UnreadableError as why:
        raise DataDependentError(f"{error}. What follows cannot be told: {why}") from error
    for name, parameter in recorder.model.named_parameters():
        if id(parameter) in later:
            recorder.parameters.tied[name] = reason
    return [(node, reason) for node in recorder.alive()]


_INSIDE = "it is read inside a call that is not traced"


def _where(recorder: Recorder) -> str:
    module = recorder.modules[-1] if recorder.modules else recorder.deepest
    return f"in module '{module or type(recorder.model).__name__}'"


class Recorder(TorchFunctionMode):
    """Builds a torch.fx graph of the torch calls that run while it is active.

    Tensors are known by identity; every tensor that was seen is kept alive, so that no
    identity is used twice.
    """

    def __init__(self, model: nn.Module, opaque: tuple[type[nn.Module], ...] = ()) -> None:
        super().__init__()
        self.model = model
        self._opaque = opaque
        self._paused = False
        self._given: set[int] = set()
        self.read_inside: list[Tensor] = []
        self._written: set[int] = set()  # memory that some call wrote into
        self.graph = fx.Graph()
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.modules: list[str] = []
        self.deepest = ""  # the module that was entered last
        self.parameters = Parameters(model)
        self._paths = {id(m): name for name, m in model.named_modules()}
        self._nodes: dict[int, fx.Node] = {}
        self._pieces: dict[int, tuple[fx.Node, tuple[Any, ...]]] = {}
        self._fakes: dict[int, Tensor] = {}
        self._alive: list[Any] = []
        self._numbers = {id(b) for b in model.buffers() if b.is_floating_point()}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record in this block: fake tensors on, module paths followed, all undone at its end."""
        for module in self.model.modules():
            if type(module) in self._opaque:  # undisturbed() takes this away again
                module.forward = functools.partial(self._call_opaque, module, module.forward)
        with torch.no_grad(), self.fake_mode, self, watched_by(self):
            yield

    def _call_opaque(self, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a module unseen; record it as one call on its inputs and its parameters."""
        args, kwargs = self._fake((args, kwargs))
        own = {name: self._fake(p) for name, p in module.named_parameters()}
        with self.paused((args, kwargs, own, list(module.parameters()))):
            out = forward(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # looking at the result is no call of the model's
            self.record(module, args, {**kwargs, **own}, out)
        return out

    @contextmanager
    def paused(self, given: Any = ()) -> Iterator[None]:
        """Record nothing in this block; calls still run.

        given: what the block may read. Anything else that it reads leaves the model there.
        """
        before = self._paused, self._given
        self._paused, self._given = True, {id(t) for t in tensors_anywhere(given)}
        try:
            yield
        finally:
            self._paused, self._given = before

    def _see_inside(self, value: Any) -> None:
        """Tensors that an unrecorded call reads though they were not given to its caller."""
        for tensor in tensors_anywhere(value):
            if id(tensor) not in self._given:
                name = self.parameters.name(tensor)
                if name is not None:
                    self.parameters.tied.setdefault(name, _INSIDE)
                elif self.knows(tensor):
                    self.read_inside.append(tensor)

    def enter(self, module: nn.Module) -> None:
        """Calls are made by this module until it is left."""
        self.modules.append(self._paths.get(id(module), ""))
        self.deepest = self.modules[-1]

    def leave(self) -> None:
        """Calls are made by the module around the current one again."""
        self.modules.pop()

    def run_function(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A custom autograd function is one call: its backward is not derived from its ops."""
        args, kwargs = self._fake((args, kwargs))
        with self.paused((args, kwargs)):
            out = original(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self.record(original.__self__, args, kwargs, out)
        return out

    def fake_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Fake tensors for the example inputs, each a placeholder of the graph."""
        count = iter(range(1 << 30))

        def fake(value: Any, name: str) -> Any:
            if isinstance(value, Tensor):
                tensor = self.fake_mode.from_tensor(value.detach())
                node = self.graph.create_node("placeholder", INPUT, name=f"{name}_{next(count)}")
                self._remember(tensor, node)
                node.meta = {"value": tensor, "spec": spec(tensor), "name": name}
                return tensor
            if isinstance(value, (tuple, list)):
                items = [fake(item, name) for item in value]
                return items if isinstance(value, list) else tuple(items)
            if isinstance(value, dict):
                return {key: fake(item, f"{name}[{key!r}]") for key, item in value.items()}
            return value

        names = _positional(self.model, len(args))
        return (
            tuple(fake(value, f"input '{name}'") for value, name in zip(args, names, strict=True)),
            {key: fake(value, f"input '{key}'") for key, value in kwargs.items()},
        )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            self._see_inside((args, kwargs))
            return func(*args, **kwargs)
        args, kwargs = self._fake((args, kwargs))
        key, inplace = op_key(func)
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            out = self._on_constants(func, args, kwargs)
            if out is NotImplemented:
                raise self._depends_on_data(key, error) from None
            return self._fake(out)
        produced = list(tensors_anywhere(out))
        if key in METADATA and not produced:
            return out
        read = list(tensors_anywhere((args, kwargs)))
        if not produced and not read:
            return out
        if not produced and not inplace:
            raise self._depends_on_data(key)
        self.record(func, args, kwargs, out)
        return out

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Add a call to the graph; its outputs are known from here on."""
        node = self.graph.create_node(
            "call_function", func, self._as_nodes(args), self._as_nodes(kwargs), op_key(func)[0]
        )
        module = self.modules[-1] if self.modules else ""
        self._check_shapes(func, out)
        if op_key(func)[1]:
            self._written.update(t.untyped_storage()._cdata for t in tensors_anywhere(args[:1]))
        node.meta = {
            "value": out, "spec": spec(out), "module": module, "source": user_frame()
        }  # fmt: skip
        if isinstance(out, Tensor):
            self._remember(out, node)
        else:
            self._remember_pieces(out, node, ())

    def _check_shapes(self, func: Any, out: Any) -> None:
        for tensor in tensors_anywhere(out):
            if any(isinstance(n, torch.SymInt) for n in tensor.shape):
                key = op_key(func)[0]
                raise self._depends_on_data(key, DynamicOutputShapeException(func))

    def knows(self, tensor: Tensor) -> bool:
        """Whether a call recorded so far gave this tensor."""
        return id(tensor) in self._nodes or id(tensor) in self._pieces

    def held_elsewhere(self, known: set[fx.Node]) -> list[tuple[fx.Node, str]]:
        """Results that something outside keeps: a list, a dict that a hook fills, an object."""
        nodes = [n for n in self.alive() if n.op == "call_function" and n not in known]
        return [(node, "it is kept outside of the model") for node in nodes]

    def alive(self) -> list[fx.Node]:
        """The nodes whose tensors someone else still holds. Nothing can be recorded after this."""
        for i in range(len(self._alive)):
            if id(self._alive[i]) in self._pieces:
                self.node_of(self._alive[i])
        held = [(weakref.ref(t), self._nodes[id(t)]) for t in self._alive if id(t) in self._nodes]
        for node in self.graph.nodes:
            node.meta.pop("value", None)
        for keeper in (self._alive, self._fakes, self._nodes, self._pieces):
            keeper.clear()
        return [node for reference, node in held if reference() is not None]

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that gave a tensor; parameters and constants become nodes when first met."""
        node = self._nodes.get(id(tensor))
        if node is not None:
            return node
        if id(tensor) in self._pieces:
            node, path = self._pieces[id(tensor)]
            value = node.meta["value"]
            for step in path:
                outer, value = node, value[step]
                node = self.graph.create_node("call_function", PIECE, (outer, step))
                node.meta = {**outer.meta, "value": value, "spec": spec(value)}
            self._remember(tensor, node)
            return node
        raise TraceError(
            f"{_where(self)}: a tensor of shape {tuple(tensor.shape)} was made by code that does "
            "not show in torch's function protocol (scripted or compiled code, or an extension). "
            "Replace that part by the Python module it was made from"
        )

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = node
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

    def _fake(self, value: Any) -> Any:
        """The arguments of a call with a fake tensor in place of every real one."""
        return replaced(Tensor, value, self._fake_of)

    def _fake_of(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        fake = self._fakes.get(id(tensor))
        return self._adopt(tensor) if fake is None else fake

    def _adopt(self, tensor: Tensor) -> Tensor:
        """A parameter, a buffer or a tensor that the model holds: a new leaf of the graph."""
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise TraceError(
                f"{_where(self)}: torch.func transforms (vmap, grad, ...) inside a model cannot be "
                "traced. Write that part with batched ops"
            )
        with torch._C.DisableTorchFunction():  # what this asks of the tensor is no call
            fake = self.fake_mode.from_tensor(tensor, static_shapes=True)
        name = self.parameters.name(tensor)
        if name is None:
            self.parameters.meet(tensor)
        node = self.graph.create_node("get_attr", PARAMETER if name else CONSTANT)
        # A buffer of numbers may hold others tomorrow: nothing is concluded from its values.
        unknown = name is not None or id(tensor) in self._numbers
        real = None if unknown else tensor
        node.meta = {"value": fake, "spec": spec(fake), "name": name or "", "real": real}
        self._remember(fake, node)
        self._fakes[id(tensor)] = fake
        self._alive.append(tensor)
        return fake

    def _as_nodes(self, value: Any) -> Any:
        return replaced(Tensor, value, self.node_of)

    def _on_constants(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The call on real values, where no input and no parameter has a part in them."""
        with torch._C.DisableTorchFunction(), unset_fake_temporarily():
            tensors = instances(Tensor, (args, kwargs))
            values = {id(t): self._constant(self.node_of(t)) for t in tensors}
            if any(value is None for value in values.values()):
                return NotImplemented
            args, kwargs = replaced(Tensor, (args, kwargs), lambda t: values[id(t)])
            return func(*args, **kwargs)

    def _constant(self, node: fx.Node) -> Tensor | None:
        """The value of a node that depends on constants alone; None for any other."""
        if not self._written.isdisjoint(memories(node.meta["spec"])):
            return None
        if node.op == "get_attr":
            real: Tensor | None = node.meta["real"]
            return real
        if not callable(node.target) or not repeatable(node.target):
            return None
        inputs = {n: self._constant(n) for n in node.all_input_nodes}
        if any(value is None for value in inputs.values()):
            return None
        args, kwargs = map_nodes((node.args, node.kwargs), inputs)
        value: Tensor = node.target(*args, **kwargs)
        return value

    def _depends_on_data(self, key: str, error: Exception | None = None) -> TraceError:
        shape = isinstance(error, DynamicOutputShapeException)
        what = "gives a result whose shape depends on" if shape else "reads into Python"
        kind = DataDependentError if shape else TraceError
        return kind(
            f"{_where(self)}: '{key}' at {user_frame() or 'an unknown line'} {what} the values of "
            "a tensor. Analyze the part of the model before this call"
        )


def _positional(model: nn.Module, count: int) -> list[str]:
    """Names of the first positional arguments of forward; *args are numbered."""
    found = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return [found[i] if i < len(found) else str(i) for i in range(count)]
