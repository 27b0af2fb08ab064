"""Calls in float64 that torch has no kernel for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class DoubleCalls(TorchFunctionMode):
    """While it is entered, calls on float64 tensors work that torch has for smaller types alone."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return double_call(func, args, kwargs or {})


def double_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call gives, in float64 too."""
    known = _FORMS.get(function)
    out = NotImplemented if known is None else known(*args, **kwargs)
    return function(*args, **kwargs) if out is NotImplemented else out


def _grouped_mm(
    input: Any, mat2: Any = None, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """Rows offs[e - 1] to offs[e] of (S, K) times the matrix e of (E, K, N); 0 beyond the last."""
    given = isinstance(input, Tensor) and isinstance(mat2, Tensor) and isinstance(offs, Tensor)
    plain = bias is None and out_dtype in (None, torch.float64)
    if not (given and plain) or (input.ndim, mat2.ndim, offs.ndim) != (2, 3, 1):
        return NotImplemented
    if not input.dtype == mat2.dtype == torch.float64:
        return NotImplemented
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    parts = [input[a:b] @ matrix for a, b, matrix in zip(starts, ends, mat2, strict=True)]
    return torch.cat([*parts, input.new_zeros(len(input) - ends[-1], mat2.shape[2])])


# torch 2.9 has the private one alone.
_FORMS: dict[Any, Callable[..., Any]] = {
    function: _grouped_mm
    for function in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
    if function is not None
}
