"""One run of a model on fake tensors, every torch call of which is seen.

Fake tensors have shapes and no data, so Python sees real shapes and types (loops over
`x.size()`, `isinstance(x, Tensor)`, flags and `*args` need no care), nothing is computed, and
a branch on an activation's value cannot be taken: it raises.
"""

from __future__ import annotations

import functools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from enorm_fx.errors import TraceError
from enorm_fx.nested import replaced, tensors_anywhere
from enorm_fx.tracing.modes import Questions
from enorm_fx.tracing.normalize import is_transformed
from enorm_fx.tracing.parameters import Parameters
from enorm_fx.tracing.this_thread import uncompiled, watched_by
from enorm_fx.tracing.trace import torch_is_called_by_users, user_frame

READ_INSIDE = "it is read inside a call that is not traced"


class Fakes:
    """Fake tensors that stand for the parameters, buffers and other tensors that a model holds.

    mode: where all fake tensors of the run live.
    parameters: which of the model's tensors are parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.parameters = Parameters(model)
        self._numbers = {id(b) for b in model.buffers() if b.is_floating_point()}
        self._of: dict[int, Tensor] = {}
        self._real: dict[int, Tensor] = {}

    def of(self, value: Any) -> Any:
        """The same nested value with a fake tensor in place of every real one."""
        return replaced(Tensor, value, self._one)

    def _one(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self.mode:
            return tensor
        fake = self._of.get(id(tensor))
        return self._adopt(tensor) if fake is None else fake

    def _adopt(self, tensor: Tensor) -> Tensor:
        refuse_transformed(tensor)
        with torch._C.DisableTorchFunction():  # what this asks of the tensor is no call
            if isinstance(tensor, FakeTensor):  # that an earlier run left in the model
                with self.mode:
                    fake: Tensor = torch.empty_strided(
                        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
                    )
            else:
                fake = self._without_gradient(tensor)
        if self.parameters.name(tensor) is None and not isinstance(tensor, FakeTensor):
            self.parameters.meet(tensor)
        self._of[id(tensor)] = fake
        self._real[id(fake)] = tensor  # both are kept alive, so no identity is used twice
        self._of[id(fake)] = fake
        return fake

    def _without_gradient(self, tensor: Tensor) -> Tensor:
        if tensor.is_leaf:
            return self.mode.from_tensor(tensor, static_shapes=True).requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The .grad attribute", UserWarning)  # torch asks
            return self.mode.from_tensor(tensor, static_shapes=True).detach()

    def real(self, fake: Tensor) -> Tensor | None:
        """The tensor of the model's that a fake one stands for; None for a result of a call."""
        return self._real.get(id(fake))

    def name(self, fake: Tensor) -> str | None:
        """The name of the parameter that a fake tensor stands for."""
        real = self.real(fake)
        return None if real is None else self.parameters.name(real)

    def value(self, fake: Tensor) -> Tensor | None:
        """The values of a tensor that the model holds; None where they may be others tomorrow."""
        real = self.real(fake)
        if real is None or isinstance(real, FakeTensor) or id(real) in self._numbers:
            return None
        return None if self.parameters.name(real) is not None else real

    def clear(self) -> None:
        """Let go of everything."""
        self._of.clear()
        self._real.clear()


def refuse_transformed(tensor: Tensor) -> None:
    """Raises TraceError for a tensor that the inside of a torch.func transform sees."""
    if is_transformed(tensor):
        raise TraceError(
            f"at {user_frame() or 'an unknown line'}: torch.func transforms (vmap, grad, ...) "
            "inside a model cannot be traced. Write that part with batched ops"
        )


class Run(TorchFunctionMode):
    """Sees every call that torch makes through its function protocol, on fake tensors.

    read_inside: tensors that unseen calls read though they were not given to them.
    modules: paths of the modules that are running, the innermost last; deepest: entered last.
    asked: takes the modes that code other than torch's asks for; None: nobody wants to know.
    """

    def __init__(
        self,
        model: nn.Module,
        opaque: tuple[type[nn.Module], ...],
        fakes: Fakes,
        asked: set[str] | None,
    ) -> None:
        super().__init__()
        self.opaque = opaque
        self.model = model
        self.fakes = fakes
        self.read_inside: list[Tensor] = []
        self.modules: list[str] = []
        self.deepest = ""
        self.questions = Questions(asked)
        self._paths = {id(m): name for name, m in model.named_modules()}
        self._given: set[int] | None = None  # of the unseen call that is running

    @abstractmethod
    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of torch's. Its tensors are fake; the result is what the model gets."""

    @abstractmethod
    def unseen(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """One call that was made without looking into it, and its result."""

    @contextmanager
    def active(self) -> Iterator[None]:
        """See the calls of this thread in this block."""
        unseen = [m for m in self.model.modules() if type(m) in self.opaque]
        unseen += _outermost_scripts(self.model)
        own = [module.__dict__.get("forward") for module in unseen]
        for module in unseen:
            run = functools.partial(self._run_module, module, module.forward)
            module.__dict__["forward"] = run
        try:
            with uncompiled(self.model), self.fakes.mode, self, watched_by(self), self.questions:
                yield
        finally:
            for module, forward in zip(unseen, own, strict=True):
                del module.__dict__["forward"]
                if forward is not None:
                    module.__dict__["forward"] = forward

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._given is not None:
            self._see_inside((args, kwargs))
            return func(*args, **kwargs)
        if func in _ABOUT_GRADIENTS:
            return self._about_gradients(func, *args)
        args, kwargs = self.fakes.of((args, kwargs))
        return self.call(func, args, kwargs)

    def _about_gradients(self, function: Any, tensor: Tensor, *rest: Any) -> Any:
        """What depends on whether gradients are on, which the fake tensors do not know of."""
        if function in _SETTINGS:
            return _SETTINGS[function](tensor)
        inference = function in _INFERENCE
        if torch_is_called_by_users():
            self.questions.note("inference" if inference else "grad")
        with torch._C.DisableTorchFunction():
            real = tensor if not isinstance(tensor, FakeTensor) else self.fakes.real(tensor)
            if inference:
                return torch.is_inference_mode_enabled() if real is None else real.is_inference()
            if function == _LEAF:
                return real is not None or not torch.is_grad_enabled()
            if real is not None:
                return real.requires_grad if function == _REQUIRES else None
            requires = tensor.is_floating_point() and torch.is_grad_enabled()
            return requires if function == _REQUIRES else (_SOME_FUNCTION if requires else None)

    def enter(self, module: nn.Module) -> None:
        """Calls are made by this module until it is left."""
        self.modules.append(self._paths.get(id(module), ""))
        self.deepest = self.modules[-1]

    def leave(self) -> None:
        """Calls are made by the module around the current one again."""
        self.modules.pop()

    def where(self) -> str:
        """The module that is running, or that ran last, for messages."""
        module = self.modules[-1] if self.modules else self.deepest
        return f"in module '{module or type(self.model).__name__}'"

    def run_function(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A custom autograd function is one call: its backward is not derived from its ops."""
        args, kwargs = self.fakes.of((args, kwargs))
        with self._looking_away((args, kwargs)):
            out = original(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # looking at the result is no call of the model's
            return self.unseen(original.__self__, args, kwargs, out)  # type: ignore[attr-defined]

    def _run_module(self, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """An opaque module is one call on its inputs and its parameters."""
        args, kwargs = self.fakes.of((args, kwargs))
        own = {name: self.fakes.of(p) for name, p in module.named_parameters()}
        # TorchScript does not run where torch's functions are looked at.
        hidden = isinstance(module, torch.jit.ScriptModule)
        unlooked = torch._C.DisableTorchFunction() if hidden else nullcontext()
        with self._looking_away((args, kwargs, own, list(module.parameters()))), unlooked:
            out = forward(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return self.unseen(module, args, {**kwargs, **own}, out)

    @contextmanager
    def _looking_away(self, given: Any) -> Iterator[None]:
        """Calls run unseen in this block, which is given some tensors to read."""
        before = self._given
        self._given = {id(t) for t in tensors_anywhere(given)}
        try:
            with torch.inference_mode(False), torch.no_grad():  # no matter what is being tried
                yield
        finally:
            self._given = before

    def _see_inside(self, value: Any) -> None:
        """What an unseen call reads besides what it was given leaves the model there."""
        for tensor in tensors_anywhere(value):
            if id(tensor) not in (self._given or ()):
                name = self.fakes.parameters.name(tensor)
                if name is not None:
                    self.fakes.parameters.tied.setdefault(name, READ_INSIDE)
                else:
                    self.read_inside.append(tensor)


def _outermost_scripts(model: nn.Module) -> list[nn.Module]:
    """TorchScript's modules, whose calls do not show, without those inside of others."""
    if isinstance(model, torch.jit.ScriptModule):
        return [model]
    return [script for child in model.children() for script in _outermost_scripts(child)]


_REQUIRES = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_LEAF = Tensor.is_leaf.__get__  # type: ignore[attr-defined]
_SOME_FUNCTION = object()
# What sets up gradients has no part in the function that the model computes.
_SETTINGS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.requires_grad.__set__: lambda tensor: None,  # type: ignore[attr-defined]
    Tensor.requires_grad_: lambda tensor: tensor,
    Tensor.retain_grad: lambda tensor: None,
    Tensor.register_hook: lambda tensor: RemovableHandle({}),
}
_FUNCTION: Any = Tensor.grad_fn.__get__  # type: ignore[union-attr]
_INFERENCE = {Tensor.is_inference, torch.is_inference}
_ABOUT_GRADIENTS = {_REQUIRES, _LEAF, _FUNCTION, *_INFERENCE, *_SETTINGS}
