"""Results of calls on fake tensors: of the right shape, strides and type, without values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from enorm_fx.nested import instances
from enorm_fx.tracing.op_traits import GIVES_ALIKE


class FakeResults:
    """What calls on the fake tensors of one mode give.

    Common calls are remembered by what their arguments are like: a deep network makes the same few
    calls a thousand times, and torch takes several times as long to find that out.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._known: dict[Any, _Kind | None] = {}

    def of(self, key: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call, with the op key `key`. Raises what the call raises."""
        call = self._signature(function, args, kwargs) if key in GIVES_ALIKE else None
        if call is None:
            return _call(key, function, args, kwargs)
        if call in self._known:
            kind = self._known[call]
            return function(*args, **kwargs) if kind is None else kind.another(self._mode)
        given = list(instances(Tensor, (args, kwargs)))
        versions = [tensor._version for tensor in given]
        out = _call(key, function, args, kwargs)
        written = versions != [tensor._version for tensor in given]
        self._known[call] = None if written else _kind_of(out, given, self._mode)
        return out

    def _signature(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """All that the result of a call depends on, hashable; None where more may."""
        if torch._C._is_any_autocast_enabled() or torch.is_inference_mode_enabled():
            return None
        try:
            given = tuple(self._like(value) for value in args)
            named = tuple((name, self._like(value)) for name, value in kwargs.items())
        except _UnlikeAnyError:
            return None
        return function, given, named, torch.get_default_dtype()

    def _like(self, value: Any) -> Any:
        """Equal for two arguments that make no difference to a result but by their values."""
        kind = type(value)
        if kind is FakeTensor:
            return self._like_tensor(value)
        if kind in _NUMBERS:
            return kind, value  # 1, 1.0 and True are equal, and not alike
        if kind in (tuple, list, torch.Size):
            return kind, tuple(self._like(item) for item in value)
        raise _UnlikeAnyError

    def _like_tensor(self, tensor: FakeTensor) -> Any:
        plain = (
            tensor.fake_mode is self._mode
            and tensor.constant is None  # of small constants torch knows the values
            and tensor.layout is torch.strided
            and not tensor.is_neg()
            and not tensor.is_inference()  # it does not tell whether it was written
            and not tensor.requires_grad
        )
        if not plain or tensor.dtype not in _PLAIN_TYPES:
            raise _UnlikeAnyError
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


class _Kind:
    """A fake tensor as a pattern for others, each with memory of its own."""

    def __init__(self, tensor: FakeTensor) -> None:
        self._shape, self._stride = tensor.shape, tensor.stride()
        self._dtype, self._device = tensor.dtype, tensor.device

    def another(self, mode: FakeTensorMode) -> Tensor:
        with torch._C._DisableTorchDispatch():
            bare = torch.empty_strided(self._shape, self._stride, dtype=self._dtype, device="meta")
            return FakeTensor(mode, bare, self._device)


class _UnlikeAnyError(Exception):
    """An argument may matter by more than its kind."""


_NUMBERS = (type(None), bool, int, float, str, torch.dtype)
_PLAIN_TYPES = frozenset(
    {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool}
)


def _kind_of(out: Any, given: list[Tensor], mode: FakeTensorMode) -> _Kind | None:
    """What a call gives each time; None where it is not one new tensor of the usual kind."""
    if type(out) is not FakeTensor or out.fake_mode is not mode or out.constant is not None:
        return None
    usual = out.layout is torch.strided and out.dtype in _PLAIN_TYPES and out.storage_offset() == 0
    memory = out.untyped_storage()._cdata
    shared = any(memory == tensor.untyped_storage()._cdata for tensor in given)
    return _Kind(out) if usual and not shared and not out.requires_grad else None


def _call(key: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call itself, but where torch's rule for shapes takes less than the op does."""
    known = _SHAPES.get(key)
    out = NotImplemented if known is None else known(*args, **kwargs)
    return function(*args, **kwargs) if out is NotImplemented else out


def _grouped_mm(
    input: Any, mat2: Any = None, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """(S, K) times one of E matrices (E, K, N) a row: torch asks for bfloat16, and for sizes that
    are multiples of 16 bytes, where kernels for float32 and other sizes exist."""
    given = isinstance(input, Tensor) and isinstance(mat2, Tensor) and isinstance(offs, Tensor)
    plain = bias is None and out_dtype is None
    if not (given and plain) or (input.ndim, mat2.ndim, offs.ndim) != (2, 3, 1):
        return NotImplemented
    alike = input.dtype == mat2.dtype and input.is_floating_point()
    if not alike or input.shape[1] != mat2.shape[1] or offs.shape[0] != mat2.shape[0]:
        return NotImplemented
    return torch.empty(input.shape[0], mat2.shape[2], dtype=input.dtype, device=input.device)


_SHAPES: dict[str, Callable[..., Any]] = {"grouped_mm": _grouped_mm}
