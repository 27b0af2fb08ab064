"""A digest of what must agree exactly for two networks to be one: calls, settings, plain state."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from enorm_fx.errors import ArgumentError
from enorm_fx.tracing.trace import CONSTANT, PARAMETER, Node, Trace

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.layout,
          torch.memory_format, type(...))  # fmt: skip


class Digest:
    """A hash that grows. Nothing that differs between processes or machines enters it."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def hexadecimal(self) -> str:
        return self._hash.hexdigest()

    def add_calls(self, trace: Trace) -> None:
        """Every call in order: its op, what it reads, its settings, values of constants."""
        for node in trace.nodes:
            what = node.name if node.op == PARAMETER else ""
            self._say("call", node.op, what, _settings(node.args), _settings(node.kwargs))
            value = node.compute() if node.op == CONSTANT and node.compute is not None else None
            if isinstance(value, Tensor):  # a buffer of numbers has none here
                self._add_tensor(value, "a constant of the model's code")
        for node, _ in trace.outputs:
            self._say("output", node.index)

    def add_state(self, model: nn.Module, moved: Collection[str]) -> None:
        """Names, shapes and types of all parameters and buffers, and the values of those that are
        not in `moved`. Raises ArgumentError where there are none (meta device)."""
        tensors = [*model.named_parameters(remove_duplicate=False)]
        for name, tensor in [*tensors, *model.named_buffers(remove_duplicate=False)]:
            self._say("state", name, tuple(tensor.shape), str(tensor.dtype))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name not in moved:
                self._add_tensor(tensor.detach(), f"'{name}'")

    def _say(self, *words: object) -> None:
        self._hash.update(repr(words).encode())

    def _add_tensor(self, tensor: Tensor, what: str) -> None:
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise ArgumentError(f"{what} holds no plain data ({tensor.layout}, {tensor.device})")
        with torch._C.DisableTorchFunction():
            plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
        size = plain.numel() * plain.element_size()
        self._say("values", tuple(plain.shape), str(plain.dtype))
        if size:
            self._hash.update((ctypes.c_char * size).from_address(plain.data_ptr()))


def _settings(value: Any) -> Any:
    """Nested arguments as plain values: nodes by number, by type what has no text of its own."""
    if isinstance(value, Node):
        return ("node", value.index)
    if isinstance(value, (tuple, list)):
        return [_settings(item) for item in value]
    if isinstance(value, dict):
        return [(str(key), _settings(item)) for key, item in value.items()]
    if isinstance(value, slice):
        return ["slice", *map(_settings, (value.start, value.stop, value.step))]
    return value if isinstance(value, _PLAIN) else type(value).__qualname__
