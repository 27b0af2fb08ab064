"""How the small models are written down: layers by name, and a function that uses them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

L, R, C = nn.Linear, nn.ReLU, nn.Conv2d


@dataclass(frozen=True, eq=False)
class Small:
    """A model and the shapes of its inputs."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    model: nn.Module

    def build(self) -> nn.Module:
        """A model of one's own."""
        return copy.deepcopy(self.model)

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(5)
        return tuple(
            torch.randn(shape, dtype=torch.float64, generator=generator) for shape in self.shapes
        )


class Net(nn.Module):
    """Layers by name and a function of (self, *inputs) that uses them."""

    def __init__(self, run: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


ZOO: list[Small] = []


def whole(name: str, *parts: Any) -> None:
    """Input shapes and a function that builds the model."""
    *shapes, build = parts
    ZOO.append(Small(name, tuple(shapes), build()))


def chain(name: str, shape: tuple[int, ...], *layers: nn.Module) -> None:
    """One layer after the other."""
    ZOO.append(Small(name, (shape,), nn.Sequential(*layers)))


def small(name: str, *shapes: tuple[int, ...], **layers: Any) -> Callable[..., Callable[..., Any]]:
    """The decorated function says how the layers are used."""

    def put(run: Callable[..., Any]) -> Callable[..., Any]:
        ZOO.append(Small(name, shapes, copy.deepcopy(Net(run, **layers))))
        return run

    return put
