"""The parameters of a model by identity, and which of them share memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from enorm_fx.errors import TraceError


class Parameters:
    """Names of a model's parameters.

    aliases: first name -> its other names (a parameter that two modules hold).
    tied:    parameters that must keep their values because something else sees their memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self.aliases: dict[str, tuple[str, ...]] = {}
        self.tied: dict[str, str] = {}
        self._first: dict[int, str] = {}
        self._owners: dict[int, str] = {}
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if isinstance(parameter, UninitializedParameter):
                raise TraceError(
                    f"parameter '{name}' has no shape yet: run the model once before the analysis, "
                    "so that its lazy modules are initialized"
                )
            names.setdefault(id(parameter), []).append(name)
            memory = _memory(parameter)
            other = self._owners.setdefault(memory, name) if memory else name
            if other not in names[id(parameter)]:
                for one, two in ((name, other), (other, name)):
                    self.tied[one] = f"its memory is shared with parameter '{two}'"
        for key, all_names in names.items():
            self._first[key] = all_names[0]
            self.aliases[all_names[0]] = tuple(all_names[1:])

    def name(self, tensor: Tensor) -> str | None:
        """The parameter's first name; None for a tensor that is no parameter of the model."""
        return self._first.get(id(tensor))

    def meet(self, tensor: Tensor) -> None:
        """A tensor that is no parameter: a parameter whose memory it shares becomes tied."""
        owner = self._owners.get(_memory(tensor))
        if owner is not None:
            self.tied[owner] = "its memory is shared with a tensor that is not a parameter"


def _memory(tensor: Tensor) -> int:
    """An identity of the memory behind a tensor; 0 where there is none to share."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return 0
    return int(tensor.untyped_storage()._cdata)
