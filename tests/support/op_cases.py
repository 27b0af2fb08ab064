"""How the tables of op cases are written: a name, what to run, the inputs it is run on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SPACES = {"torch": torch, "method": torch.Tensor, "F": F, "nn": torch._C._nn}
_seeds = itertools.count()


@dataclass(frozen=True, eq=False)
class OpCase:
    """One call of one op.

    slack: empty where the rule must find every scaling that the op admits; otherwise why it finds
           fewer by design.
    scales: with slack, how many it finds; None where that is not the point.
    tolerance: relative; for ops that round.
    spelling_of: cases with the same one are one op on the same inputs.
    """

    name: str
    run: Callable[..., Any]
    inputs: tuple[Any, ...]
    slack: str = ""
    scales: int | None = None
    tolerance: float = 1e-9
    spelling_of: object = None


def x(*shape: int) -> Tensor:
    """Random numbers of both signs, other ones in every call."""
    generator = torch.Generator().manual_seed(next(_seeds))
    drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
    return -drawn.abs() if drawn.numel() == 1 else drawn


def pos(*shape: int) -> Tensor:
    """Random positive numbers."""
    return x(*shape).abs() + 0.1


IN_PLACE = "what is written in place keeps its label"


def layer(module: nn.Module) -> nn.Module:
    """The layer with random numbers in all its parameters and running statistics."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(x(*parameter.shape))
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(pos(*buffer.shape) if name.endswith("var") else x(*buffer.shape))
    return module


def spell(
    name: str, *args: Any, inputs: tuple[Any, ...], slack: str = "", in_place: str = "",
    **kwargs: Any,
) -> Iterator[OpCase]:  # fmt: skip
    """The op as torch function, method and functional, each in place too where there is one.

    in_place: the slack of the spellings that write in place.
    """
    op = object()
    for space, home in _SPACES.items():
        for spelling in (name, f"{name}_"):
            function = getattr(home, spelling, None)
            if function is None or not callable(function):
                continue

            def run(*tensors: Any, function: Any = function) -> Any:
                return function(*tensors, *args, **kwargs)

            why = (spelling != name and in_place) or slack
            shown = ", ".join(map(str, (*args, *(f"{k}={v}" for k, v in kwargs.items()))))
            yield OpCase(f"{space}.{spelling}({shown})", run, inputs, why, spelling_of=op)
