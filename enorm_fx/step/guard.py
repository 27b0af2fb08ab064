"""Is everything still where it was when the step was compiled? Asked before every step.

A compiled step writes to addresses. Parameters, modules and optimizer state may be replaced, moved,
cast or swapped between two steps; then it must be compiled anew, and never run as it is. And where
the model itself has changed, its plan no longer holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from enorm_fx.errors import PlanError
from enorm_fx.step.checks import find_held
from enorm_fx.step.native.places import items_of, places_of


class Guard:
    """Remembers where tensors are. It keeps their storages alive, so that no other tensor can come
    to lie at the same address meanwhile.

    names: of the parameters in `model.named_parameters()`. buffers: by optimizer, names of state.
    natively: ask torch by native code, where that is possible.

    The lists belong together: `holders[k][keys[k]]` was `values[k]`. They are compared by `map`:
    after a step this data is out of the processor's cache, so as little of it as possible is read.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        buffers: Mapping[Optimizer, Sequence[str]],
        natively: bool,
    ) -> None:
        self._holders: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._values: list[object] = []
        self._tensors: list[Tensor] = []
        for module in model.modules():
            for name, child in module._modules.items():
                self._add(module._modules, name, child)
        self._parameters = []
        for name in names:
            path, _, leaf = name.rpartition(".")
            parameter = find_held(model, name)
            self._parameters.append(parameter)
            self._add(model.get_submodule(path)._parameters, leaf, parameter)
        self._states = [(o, list(o.state), list(o.state.values())) for o in buffers]
        held: list[dict[str, Any]] = []
        for optimizer, known in buffers.items():
            for parameter in self._parameters:
                if (state := optimizer.state.get(parameter)) is not None:
                    held.append(state)
                    # Where all that is there is known, what comes makes it longer.
                    for key in state if state.keys() <= set(known) else known:
                        self._add(state, key, state.get(key))
        dicts = [d for module in model.modules() for d in (module._modules, module._parameters)]
        self._sized = [*dicts, *held]
        self._sizes = [len(d) for d in self._sized]
        self._items = items_of(self._holders, self._keys, self._sized) if natively else None
        self._places = places_of(self._tensors) if natively else None
        self._aliases = [tensor.detach() for tensor in self._tensors]
        self._types = [type(tensor) for tensor in self._tensors]
        self._storages = [tensor.untyped_storage() for tensor in self._tensors]
        self._addresses = [storage.data_ptr() for storage in self._storages]
        self._bytes = [storage.nbytes() for storage in self._storages]
        self._dtypes = [tensor.dtype for tensor in self._tensors]
        self._trained = [parameter.requires_grad for parameter in self._parameters]

    def _add(self, holder: dict[str, Any], key: str, value: object) -> None:
        self._holders.append(holder)
        self._keys.append(key)
        self._values.append(value)
        if isinstance(value, Tensor):
            self._tensors.append(value)

    def holds(self) -> bool:
        """True: every module and every tensor of the step is the one it was, at the same place."""
        return (
            (self._same_items() if self._items is None else self._items.hold())
            and all(map(_same_state, self._states))
            and self._same_memory()
        )

    def _same_items(self) -> bool:
        """Whether dictionaries hold what they held, and no more."""
        found = map(dict.get, self._holders, self._keys)
        return all(map(is_, found, self._values)) and list(map(len, self._sized)) == self._sizes

    def _same_memory(self) -> bool:
        # swap_tensors makes another kind of tensor of the same object: asked before all else.
        if list(map(type, self._tensors)) != self._types:
            return False
        # A storage that was freed or resized is still the same storage, and less room may have come
        # to lie at the same address. Where it has its room at its address, a tensor in it is safe.
        return (
            (self._alike() if self._places is None else self._places.hold())
            and list(map(_nbytes, self._storages)) == self._bytes
            and list(map(_address, self._storages)) == self._addresses
            and list(map(_requires_grad, self._parameters)) == self._trained
        )

    def _alike(self) -> bool:
        """Whether all tensors have the storage, the place in it and the dtype that they had."""
        try:
            same = all(map(Tensor.is_set_to, self._tensors, self._aliases))
        except RuntimeError:  # it cannot be asked across devices
            return False
        return same and list(map(_dtype, self._tensors)) == self._dtypes


_dtype, _requires_grad = attrgetter("dtype"), attrgetter("requires_grad")
_nbytes, _address = torch.UntypedStorage.nbytes, torch.UntypedStorage.data_ptr


def _same_state(known: tuple[Optimizer, list[Any], list[Any]]) -> bool:
    """Whether an optimizer keeps the same state for the same parameters. By their order: to look a
    tensor up costs more."""
    optimizer, keys, values = known
    state = optimizer.state
    return (
        len(state) == len(keys)
        and all(map(is_, state, keys))
        and all(map(is_, state.values(), values))
    )


@dataclass(frozen=True, slots=True)
class Structure:
    """What a plan presupposes of its model: classes of modules, and parameters by name.

    pinning: every parameter that the plan moves could be trained, so one that is frozen later
    should not move.
    """

    modules: Mapping[str, str]
    parameters: frozenset[str]
    moved: tuple[str, ...]
    pinning: bool

    def check(self, model: nn.Module) -> None:
        """Raises PlanError if the model is no longer the one that was analyzed."""
        now = structure_of(model, self.moved)
        for name in sorted(self.modules.keys() | now.modules.keys()):
            was, found = self.modules.get(name, "nothing"), now.modules.get(name, "nothing")
            if was != found:
                raise PlanError(
                    f"'{name or 'the model'}' was {was} and is {found}; nothing was written. "
                    "Analyze the model again, or make the ENorm after it has been wrapped"
                )
        for name in sorted(now.parameters - self.parameters):
            raise PlanError(
                f"the model has a new parameter '{name}'; nothing was written. Analyze it again"
            )
        if self.pinning and not now.pinning:
            frozen = [n for n in self.moved if not find_held(model, n).requires_grad]
            raise PlanError(
                f"'{frozen[0]}' has been frozen since; nothing was written. Analyze the model "
                "again: with frozen='pin' it then stays, with frozen='rescale' it moves on"
            )


def structure_of(model: nn.Module, moved: Iterable[str]) -> Structure:
    """moved: names of the parameters that the plan moves."""
    moved = tuple(moved)
    return Structure(
        {name: type(m).__name__ for name, m in model.named_modules(remove_duplicate=False)},
        frozenset(name for name, _ in model.named_parameters(remove_duplicate=False)),
        moved,
        all(find_held(model, name).requires_grad for name in moved),
    )
