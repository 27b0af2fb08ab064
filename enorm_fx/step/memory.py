"""Which tensors may be touched: plain ones, whose memory is what their shape says.

A backend takes addresses, and even a torch operation reads past the end of a storage that was
freed. So whatever is read or written is looked at first: each parameter when it is looked up, each
buffer and gradient when it is collected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from enorm_fx.errors import PlanError


def check_plain(tensor: Tensor, what: str) -> None:
    """Raises PlanError unless the tensor is a plain strided one whose storage covers its shape.

    what: names the tensor in the message.
    """
    problem = _why_not_plain(tensor)
    if problem:
        raise PlanError(f"{what} {problem}; nothing was written")


def _why_not_plain(tensor: Tensor) -> str:
    kind = type(tensor)
    # A subclass that dispatches for itself (DTensor, quantized, fake, functional) may hold
    # anything, or nothing; one that only carries more attributes is as plain as a Parameter.
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or _is_wrapped(tensor):
        return (
            f"is a {kind.__name__}, whose memory is not what its shape says: "
            "only plain tensors can be rescaled"
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"is a tensor of {tensor.layout}, not a plain strided one"
    if tensor.is_meta or not tensor.numel():
        return ""
    last = tensor.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    needed = (last + 1) * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if held < needed:
        return (
            f"has the shape {tuple(tensor.shape)}, for which it needs {needed:,} bytes, but its "
            f"storage holds {held:,}: it was freed, resized or moved elsewhere. Bring the values "
            "back first"
        )
    if _shares_places(tensor):
        return (
            f"of shape {tuple(tensor.shape)} is expanded: several of its entries share one place "
            "in memory, so they cannot be rescaled apart. Make it contiguous first"
        )
    return ""


def _shares_places(tensor: Tensor) -> bool:
    """Whether entries share memory: an axis does not step over what the finer ones reach."""
    reach = 0
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted((s, n) for s, n in axes if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _is_wrapped(tensor: Tensor) -> bool:
    """Tensors of torch.func transforms and of functionalization look plain from outside."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or bool(torch._is_functional_tensor(tensor))
