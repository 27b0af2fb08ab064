"""Fake tensors, which have shapes and no values, in the place of what a model holds."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from enorm_fx.errors import TraceError
from enorm_fx.nested import replaced
from enorm_fx.tracing.normalize import is_transformed
from enorm_fx.tracing.parameters import Parameters
from enorm_fx.tracing.trace import user_frame


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
        self._storages = _Storages(self.mode)

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
                fake = self._storages.fake(tensor)
        if self.parameters.name(tensor) is None and not isinstance(tensor, FakeTensor):
            self.parameters.meet(tensor)
        self._of[id(tensor)] = fake
        self._real[id(fake)] = tensor  # both are kept alive, so no identity is used twice
        self._of[id(fake)] = fake
        return fake

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
        self._storages = _Storages(self.mode)


def refuse_transformed(tensor: Tensor) -> None:
    """Raises TraceError for a tensor that the inside of a torch.func transform sees."""
    if is_transformed(tensor):
        raise TraceError(
            f"at {user_frame() or 'an unknown line'}: torch.func transforms (vmap, grad, ...) "
            "inside a model cannot be traced. Write that part with batched ops"
        )


class _Storages:
    """Memory without bytes for every memory that real tensors lie in.

    Tensors that share their memory are given fake ones that share theirs. torch's own conversion
    does the same for every kind of tensor, in six times the time; of a memory that it was asked
    for, it makes all fake tensors.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._of: dict[int, tuple[torch.UntypedStorage | None, torch.UntypedStorage]] = {}

    def fake(self, tensor: Tensor) -> Tensor:
        """A fake tensor without a gradient."""
        if not _has_memory(tensor):
            return self._by_torch(tensor)
        real = tensor.untyped_storage()
        known = self._of.get(real._cdata)
        if known is None:
            plain = _is_plain(tensor, real.nbytes())
            bare = torch.UntypedStorage(real.nbytes(), device="meta") if plain else None
            # The real one is kept alive, so that its identity is used once.
            known = self._of[real._cdata] = (bare, real)
        bare = known[0]
        if bare is None:
            return self._by_torch(tensor)
        if tensor.is_conj() or tensor.is_neg():
            raise TraceError(
                f"a tensor of shape {tuple(tensor.shape)} that the model holds is a conjugated or "
                "negated view of another one. Hold a copy of it (tensor.resolve_conj().clone())"
            )
        with torch._C._DisableTorchDispatch(), torch.inference_mode(tensor.is_inference()):
            where = (tensor.storage_offset(), tensor.shape, tensor.stride())
            shape = torch.empty(0, dtype=tensor.dtype, device="meta").set_(bare, *where)
            fake: Tensor = FakeTensor(self._mode, shape, tensor.device)
        if isinstance(tensor, nn.Parameter):
            fake._is_param = True
        if tensor.is_leaf and tensor.grad is not None:  # which the model may read
            fake.grad = self.fake(tensor.grad)
        return fake

    def _by_torch(self, tensor: Tensor) -> Tensor:
        if tensor.is_leaf:
            return self._mode.from_tensor(tensor, static_shapes=True).requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The .grad attribute", UserWarning)  # torch asks
            return self._mode.from_tensor(tensor, static_shapes=True).detach()


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is one of torch's own that lies in memory, by strides."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda", "meta", "mps", "xpu")
        and not tensor.is_nested
        and not tensor.is_quantized
        and not torch._is_functional_tensor(tensor)
    )


def _is_plain(tensor: Tensor, size: int) -> bool:
    """Whether shape, type and place are all that there is to know of a tensor.

    Whole numbers without axes are not: torch remembers their values for Python. size: bytes of the
    tensor's memory.
    """
    return (
        tensor.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        and tensor.ndim > 0
        and size >= (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
        and not tensor.is_neg()
    )
