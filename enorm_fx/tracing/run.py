"""One run of a model on fake tensors, every torch call of which is seen.

Fake tensors have shapes and no data, so Python sees real shapes and types (loops over
`x.size()`, `isinstance(x, Tensor)`, flags and `*args` need no care), nothing is computed, and
a branch on an activation's value cannot be taken: it raises.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from enorm_fx.nested import tensors_anywhere
from enorm_fx.tracing.fakes import Fakes
from enorm_fx.tracing.modes import Questions
from enorm_fx.tracing.this_thread import uncompiled, watched_by
from enorm_fx.tracing.trace import torch_is_called_by_users

READ_INSIDE = "it is read inside a call that is not traced"


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
