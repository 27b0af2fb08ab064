"""What a generated step keeps from one group to the next: scales, and sums to be checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from enorm_fx.step.generated.script import Script
from enorm_fx.step.measure import accumulation_dtype
from enorm_fx.step.recipe import Recipe

_DEPTH_RANGE = 1e6  # of c^(-p * depth), above which float32 is not trusted with it


@dataclass(slots=True, eq=False)
class State:
    """scales: (2, num_scales + 1), exp(p * u) and exp(-p * u) (p = inf: without p); the last column
    stays 1 and is what pinned positions (-1) read.

    sums: flat, nonnegative. The sums of the first cycle cover every counted entry, unscaled: where
    all of them are finite and small, so are the weights.
    """

    scales: Tensor
    sums: Tensor
    taken: int

    def take(self, size: int) -> Tensor:
        """Sums that nobody has yet, (size,)."""
        self.taken += size
        return self.sums[self.taken - size : self.taken]


def state_dtype(recipe: Recipe) -> torch.dtype:
    """That of the cells, if they agree; float64 where they do not, or c reaches far."""
    counted = {block.entry for block in recipe.layout.blocks}
    found = {
        accumulation_dtype(recipe.weights[entry].dtype, recipe.p, wide=False) for entry in counted
    }
    depths = [block.depth for block in recipe.layout.blocks] or [0]
    reach = abs(recipe.power * math.log(recipe.c)) * (max(depths) - min(depths))
    if len(found) == 1 and reach < math.log(_DEPTH_RANGE):
        return found.pop()
    return torch.float64


def offset_of(tensor: Tensor) -> int:
    """Where it begins in its memory."""
    return int(tensor.storage_offset())


def make_state(script: Script, recipe: Recipe) -> State:
    layout = recipe.layout
    dtype = state_dtype(recipe)
    device = recipe.weights[0].device if recipe.weights else torch.device("cpu")
    scales = torch.ones(2, layout.num_scales + 1, dtype=dtype, device=device)
    # Of every group a sum per coefficient, of every touch a whole part, of every block's rows one.
    room = sum(group.channels * len(group.positive + group.negative) for group in layout.groups)
    for group in layout.groups:
        parts = (layout.blocks[touch.block].parts[touch.part] for touch in group.touches)
        room += sum(math.prod(part.shape) for part in parts)
    room += sum(2 + math.prod(block.shape[:1]) for block in layout.blocks)
    return State(scales, torch.zeros(room, dtype=dtype, device=device), 0)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Flat neighbouring parts of one memory as one."""
    return parts[0].as_strided((sum(map(len, parts)),), (1,))


def strided(
    base: Tensor, starts: Sequence[int], shape: tuple[int, ...], strides: tuple[int, ...]
) -> Tensor:
    """Equal views of one memory at even distances, (len(starts), *shape); one alone: shape."""
    if len(starts) == 1:
        return base.as_strided(shape, strides, starts[0])
    return base.as_strided((len(starts), *shape), (starts[1] - starts[0], *strides), starts[0])
