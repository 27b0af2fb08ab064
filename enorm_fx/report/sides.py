"""The two sides of a parameter: the groups that move each of them, or what pins it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from enorm_fx.plan.data import PlanData
from enorm_fx.plan.records import Blocked, ScaledParameter


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """The "output" or "input" side of a parameter.

    groups:  numbers of the plan's groups that move it.
    moved:   how many of its slices they move; slices: how many it has.
    blocked: why nothing moves it, None where something may.
    """

    name: str
    groups: tuple[int, ...]
    moved: int
    slices: int
    blocked: Blocked | None


def sides(plan: PlanData) -> dict[str, tuple[Side, Side]]:
    """Output and input side of every parameter of the plan, by its name."""
    blocked = {(b.weight, b.side): b for b in plan.blocked}
    sizes = torch.tensor([group.channels for group in plan.groups], dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(plan.groups)), sizes)
    return {p.name: _sides_of(p, owner, blocked) for p in plan.parameters}


def _sides_of(
    parameter: ScaledParameter, owner: Tensor, blocked: dict[tuple[str, str], Blocked]
) -> tuple[Side, Side]:
    """The output and the input side of one parameter; owner: scale -> number of its group."""
    pinned = {side: blocked.get((parameter.name, side)) for side in ("output", "input")}
    result = []
    for side, sign in (("output", 1), ("input", -1)):
        # With the other side pinned, all that moves the parameter belongs to this one: some ops
        # scale slices of one axis up and others down. One axis is an output side.
        alone = any(why is not None for name, why in pinned.items() if name != side)
        if len(parameter.shape) < 2:
            alone = side == "output"
        indices = [
            t.index
            for t in parameter.terms
            if alone or (t.coefficient * sign > 0 and len(parameter.shape) > 1)
        ]
        groups: set[int] = set()
        moved = torch.zeros((), dtype=torch.bool)
        for index in [] if pinned[side] else indices:
            groups.update(owner[index[index >= 0]].tolist())
            moved = moved | (index >= 0)
        count = int(moved.sum())
        result.append(Side(side, tuple(sorted(groups)), count, moved.numel(), pinned[side]))
    return result[0], result[1]
