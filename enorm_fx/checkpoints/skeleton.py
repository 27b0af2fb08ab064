"""A model without weights of its own, and how it gets those of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import UninitializedParameter

from enorm_fx.errors import CheckpointError

_SHOWN = 4  # names in an error
_PACKED, _ONE_EXPERT = ".experts.", re.compile(r"\.experts\.\d+\.")


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are made in this block get parameters without memory, on the meta device.

    Buffers and other tensors are made as ever: they may be computed from each other, and those
    that no checkpoint holds are needed as they are.
    """
    handle = register_module_parameter_registration_hook(_without_memory)
    try:
        yield
    finally:
        handle.remove()


def _without_memory(module: nn.Module, name: str, parameter: Tensor | None) -> Any:
    """The parameter to be registered instead; None to register the given one."""
    if type(parameter) is not nn.Parameter or parameter.is_meta:
        return None  # none, without a shape yet, of a kind of its own, or already without memory
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A parameter or persistent buffer of a model, under all of its names.

    names: as in its state_dict. tensor: what is there now.
    """

    names: tuple[str, ...]
    tensor: Tensor

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter, not a buffer."""
        return isinstance(self.tensor, nn.Parameter)


def slots(model: nn.Module) -> tuple[Slot, ...]:
    """What a checkpoint of the model holds, in the order of its modules."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        held: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
        for name, tensor in held.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                names.setdefault(id(tensor), []).append(f"{path}.{name}" if path else name)
                tensors[id(tensor)] = tensor
    return tuple(Slot(tuple(found), tensors[key]) for key, found in names.items())


def fitted(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> dict[Slot, Tensor]:
    """For each slot of the model its tensor in a checkpoint.

    Names that the model ties may be there once, or several times with the same values. `source`
    names the checkpoint in errors.

    Raises CheckpointError where names are missing or too many, shapes differ, or tied names have
    different values.
    """
    found: dict[Slot, Tensor] = {}
    missing: list[str] = []
    known: set[str] = set()
    for slot in slots(model):
        known.update(slot.names)
        there = [name for name in slot.names if name in tensors]
        if there:
            found[slot] = _one_of(there, tensors, slot, source)
        elif not slot.names[0].endswith("num_batches_tracked"):  # old files have none
            missing.append(slot.names[0])
    _check_names(missing, [name for name in tensors if name not in known], source)
    return found


def fill_(model: nn.Module, tensors: Mapping[Slot, Tensor]) -> None:
    """Put a tensor into each slot of the model, in place of what is there. They are not copied;
    ties stay."""
    for slot, tensor in tensors.items():
        value = tensor.detach()
        if slot.is_parameter:
            value = nn.Parameter(value, slot.tensor.requires_grad and value.is_floating_point())
        for name in slot.names:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            if slot.is_parameter:
                setattr(module, leaf, value)  # recurrent layers keep lists that follow only this
            else:
                module._buffers[leaf] = value


def _one_of(names: list[str], tensors: Mapping[str, Tensor], slot: Slot, source: str) -> Tensor:
    """The tensor that all these names stand for."""
    first = tensors[names[0]]
    for name in names:
        if not _is_lazy(slot.tensor) and tensors[name].shape != slot.tensor.shape:
            raise CheckpointError(
                f"'{name}' has the shape {tuple(tensors[name].shape)} in {source} and "
                f"{tuple(slot.tensor.shape)} in the model"
            )
        other = tensors[name]
        if name != names[0] and (other.dtype != first.dtype or not torch.equal(other, first)):
            raise CheckpointError(
                f"the model ties '{names[0]}' and '{name}', but {source} has different values "
                "for them"
            )
    return first


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, UninitializedParameter)


def _check_names(missing: list[str], extra: list[str], source: str) -> None:
    """Raises CheckpointError unless the checkpoint has all of the model's names and no others."""
    said = []
    if missing:
        said.append(f"lacks {_listed(missing)}")
    if extra:
        said.append(f"has {_listed(extra)}, which the model does not have")
    if not said:
        return
    prefix = next(
        (p for name in extra for p in (name.removesuffix(m) for m in missing) if p != name), None
    )
    hint = f". Are its names those of the model with '{prefix}' before them?" if prefix else ""
    if any(_PACKED in name for name in missing) and any(_ONE_EXPERT.search(n) for n in extra):
        hint = (
            ". The model packs its experts and the checkpoint does not: load it with transformers, "
            "save the state_dict() of that model, and give this file"
        )
    raise CheckpointError(f"{source} {' and '.join(said)}{hint}")


def _listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:_SHOWN]) + rest
