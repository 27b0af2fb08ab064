"""Running a model whose weights lie in files: each is in memory while it is needed, in float64 too.

torch hands every call that a model makes to a mode. In float64 it passes the call on with a float64
copy of each weight in it, which is gone after the call: a model of which no float64 copy has room
runs all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from enorm_fx.checkpoints.weight_file import Edit
from enorm_fx.nested import instances, replaced
from enorm_fx.tracing.double_calls import double_call
from enorm_fx.tracing.inputs import Call
from enorm_fx.tracing.outputs import outputs_of

_READ = 1 << 28  # bytes of weights after which what was read is given back
_TO_DOUBLE = (Tensor.float, Tensor.half, Tensor.bfloat16)
_GATHER = (F.embedding, torch.embedding)


def random_call(call: Call, seed: int) -> Call:
    """The call with random numbers for its floating-point tensors, from N(0, 1), in their types."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        values = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
        return values.to(tensor.device, tensor.dtype)

    return replaced(Tensor, call, draw)  # type: ignore[no-any-return]


def run_from_files(model: nn.Module, call: Call, release: Callable[[], None]) -> list[Tensor]:
    """The floating-point outputs of a model in the types that its weights have.

    release: gives back memory that files can fill again.
    """
    with _Reading(release):
        return _outputs(model, call)


def run_in_double(
    model: nn.Module,
    call: Call,
    release: Callable[[], None],
    edits: Mapping[str, Edit] | None = None,
) -> list[Tensor]:
    """The floating-point outputs of a model in float64; the model stays as it is.

    edits: by name of a parameter, how its float64 copy is changed before it is used.
    """
    changes = {id(model.get_parameter(name)): edit for name, edit in (edits or {}).items()}
    double = replaced(Tensor, call, _double)
    with _buffers_in_double(model), _double_by_default(), _InDouble(release, changes):
        return _outputs(model, double)


def _outputs(model: nn.Module, call: Call) -> list[Tensor]:
    args, kwargs = call
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)  # of models that draw: the same numbers in every run
        found = outputs_of(model(*args, **kwargs), call)
        return [t.clone() for t in found if t.is_floating_point()]


class _Reading(TorchFunctionMode):
    """Gives back what was read of the weights, time and again."""

    def __init__(self, release: Callable[[], None]) -> None:
        super().__init__()
        self._release, self._read = release, 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _is_getter(func):
            for weight in instances(nn.Parameter, (args, kwargs or {})):
                self.count(weight)
            self.give_back()
        return result

    def count(self, weight: Tensor) -> None:
        """A weight was read."""
        self._read += weight.numel() * weight.element_size()

    def give_back(self) -> None:
        """After a call."""
        if self._read > _READ:
            self._release()
            self._read = 0


class _InDouble(_Reading):
    """Every call in float64, whatever types its arguments have or ask for."""

    def __init__(self, release: Callable[[], None], edits: Mapping[int, Edit]) -> None:
        super().__init__(release)
        self._edits = edits

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _is_getter(func):
            return self._attribute(func, args)
        if func in _GATHER and not any(id(t) in self._edits for t in instances(Tensor, args)):
            return _double(func(*args, **kwargs))  # a few rows of a large table
        if func in _TO_DOUBLE:
            func = Tensor.double
        # What is written into is made in float64 already; a copy of it would keep the result.
        kept = 1 if _writes(func) else 0
        given = {name: value for name, value in kwargs.items() if name != "out"}
        changed = replaced(Tensor, (args[kept:], given), self._wide)
        args_after, kwargs_after = replaced(torch.dtype, changed, _wide_type)
        if "out" in kwargs:
            kwargs_after["out"] = kwargs["out"]
        result = double_call(func, (*args[:kept], *args_after), kwargs_after)
        self.give_back()
        return result

    def _attribute(self, func: Any, args: tuple[Any, ...]) -> Any:
        """An attribute of a tensor, which may be a tensor too (`weight.T`)."""
        found = func(*args)
        if isinstance(found, Tensor):
            return func(*replaced(Tensor, args, self._wide))
        return _wide_type(found) if isinstance(found, torch.dtype) else found

    def _wide(self, tensor: Tensor) -> Tensor:
        edit = self._edits.get(id(tensor))
        if isinstance(tensor, nn.Parameter):
            self.count(tensor)
        double = _double(tensor.detach())
        if edit is not None:
            double = double.clone() if double.dtype == tensor.dtype else double
            edit(double)
        return double


def _is_getter(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__"


def _writes(func: Any) -> bool:
    """Whether a call writes into its first argument."""
    name: str = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (name.startswith("__i") and name in _IN_PLACE)
    return name.endswith("_")


_IN_PLACE = {f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod",
                                     "and", "or", "xor", "lshift", "rshift", "matmul")}  # fmt: skip


def _double(tensor: Tensor) -> Tensor:
    """In float64, or complex128, if it has floating-point numbers."""
    dtype = _wide_type(tensor.dtype)
    return tensor if dtype == tensor.dtype else tensor.to(dtype)


def _wide_type(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_floating_point:
        return torch.float64
    return torch.complex128 if dtype.is_complex else dtype


@contextmanager
def _buffers_in_double(model: nn.Module) -> Iterator[None]:
    """Float64 copies of the buffers, which a run may write into; then the old ones are back."""
    before = [(module, dict(module._buffers)) for module in model.modules()]
    copies: dict[int, Tensor] = {}
    try:
        for module, held in before:
            for name, buffer in held.items():
                if buffer is not None:
                    copy = copies.setdefault(id(buffer), _double(buffer.detach().clone()))
                    module._buffers[name] = copy
        yield
    finally:
        for module, held in before:
            module._buffers.update(held)


@contextmanager
def _double_by_default() -> Iterator[None]:
    """Tensors that the model makes as it runs are float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
