"""What a rescaling did to a model's weights: norms by layer, and the range of every channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_CHUNK = 1 << 20  # entries that are looked at at once


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A weight: its l_2 norm, and max |w| of each of its channels (entries of its first axis)."""

    norm: float
    ranges: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A weight before and after, in the order of the model."""

    name: str
    before: Measured
    after: Measured

    @property
    def moved(self) -> bool:
        """Whether a channel has another range than before."""
        return not torch.equal(self.before.ranges, self.after.ranges)


def measure_weights(model: nn.Module, axes: int = 2) -> dict[str, Measured]:
    """Every floating-point parameter of so many axes or more, by name."""
    return {
        name: _measured(parameter.detach())
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.dim() >= axes and parameter.numel()
    }


def layers(before: Mapping[str, Measured], after: Mapping[str, Measured]) -> tuple[Layer, ...]:
    """The same weights, measured twice."""
    return tuple(Layer(name, old, after[name]) for name, old in before.items())


def span(shown: tuple[Layer, ...]) -> tuple[float, float]:
    """The smallest and largest range that is not zero, of all channels before and after."""
    ranges = torch.cat([torch.ones(0), *(m.ranges for x in shown for m in (x.before, x.after))])
    positive = ranges[ranges > 0]
    if not len(positive):
        return 0.1, 1.0
    return float(positive.min()), float(positive.max())


def _measured(weight: Tensor) -> Measured:
    rows = max(1, _CHUNK * len(weight) // weight.numel())
    ranges, squares = [], 0.0
    for piece in weight.split(rows):
        sizes = piece.reshape(len(piece), -1).to(torch.float64).abs()
        ranges.append(sizes.amax(1))
        squares += float(sizes.square().sum())
    return Measured(squares**0.5, torch.cat(ranges))
