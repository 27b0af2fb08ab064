"""Is everything still where it was when the step was compiled? Asked before every step.

A compiled step writes to addresses. Parameters, modules and optimizer state may be replaced, moved,
cast or swapped between two steps; then it must be compiled anew, and never run as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Bound:
    """Remembers where tensors are. It keeps their memory alive, so that no other tensor can come
    to lie at the same address meanwhile.

    names: of the parameters in `model.named_parameters()`. buffers: names of optimizer state.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        optimizer: Optimizer | None,
        buffers: Iterable[str],
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._children: dict[tuple[int, str], tuple[dict[str, Any], str, nn.Module]] = {}
        self._tensors: list[tuple[Mapping[str, Any], str, Tensor, tuple[Any, ...]]] = []
        self._states: list[tuple[Tensor, dict[str, Any] | None, int]] = []
        self._absent: list[tuple[Mapping[str, Any], str, object]] = []
        self._alive: list[Tensor] = []
        buffers = tuple(buffers)
        for name in names:
            parameter = self._add_path(name)
            if optimizer is not None:
                self._add_state(optimizer, parameter, buffers)
        self._modules = list(self._children.values())

    def _add_path(self, name: str) -> Tensor:
        *path, leaf = name.split(".")
        module = self._model
        for part in path:
            child = module._modules[part]
            assert child is not None  # the parameter was found through it
            self._children[id(module), part] = module._modules, part, child
            module = child
        parameter = module._parameters[leaf]
        assert parameter is not None  # it was found
        self._add_tensor(module._parameters, leaf, parameter)
        return parameter

    def _add_state(self, optimizer: Optimizer, parameter: Tensor, buffers: tuple[str, ...]) -> None:
        state = optimizer.state.get(parameter)
        self._states.append((parameter, state, 0 if state is None else len(state)))
        if state is not None:
            for key in buffers:
                value = state.get(key)
                if isinstance(value, Tensor):
                    self._add_tensor(state, key, value)
                else:
                    self._absent.append((state, key, value))

    def _add_tensor(self, holder: Mapping[str, Any], key: str, tensor: Tensor) -> None:
        self._tensors.append((holder, key, tensor, _place(tensor)))
        self._alive.append(tensor.detach())

    def holds(self) -> bool:
        """True: every tensor of the step is the one it was, at the same place."""
        for children, name, child in self._modules:
            if children.get(name) is not child:
                return False
        for holder, key, tensor, place in self._tensors:
            if holder.get(key) is not tensor or _place(tensor) != place:
                return False
        if self._optimizer is not None:
            states = self._optimizer.state
            for parameter, state, size in self._states:
                if states.get(parameter) is not state or (state is not None and len(state) != size):
                    return False
        return all(holder.get(key) is value for holder, key, value in self._absent)


def _place(tensor: Tensor) -> tuple[int, torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
