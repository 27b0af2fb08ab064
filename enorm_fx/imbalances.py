"""`imbalance`: which layers are badly scaled now, and how far they are from the optimum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from enorm_fx.analysis import as_plan
from enorm_fx.model_plan import Plan
from enorm_fx.report.names import few, plural
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.checks import check_finite, check_settings
from enorm_fx.step.converge import converge_
from enorm_fx.step.descent import gaps, pulls
from enorm_fx.step.precision import full_precision

_TOLERANCE = 1e-6  # of the optimum that is compared with: three digits are shown
_SHOWN = 20  # groups in str()


@dataclass(frozen=True, slots=True)
class GroupImbalance:
    """How badly one group of scales is placed.

    channels, producers, consumers: those of the group.
    ratio:             l_p norm of what it divides over that of what it multiplies (weights that
                       count in J, times c^-depth; for p = inf the largest entries). 1 at the
                       optimum of a chain; inf or 0 where one side has nothing, nan where neither.
    largest_log_scale: max |log d| over its channels, d the factors to the optimum; 0 where J has
                       none.
    gap:               the largest |P - N| / (P + N) over its channels, P and N what pulls a scale
                       down and up in J: 0 at the optimum, 1 at worst.
    """

    channels: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    ratio: float
    largest_log_scale: float
    gap: float


@dataclass(frozen=True, slots=True)
class Imbalance:
    """What `imbalance` gives: all groups, the worst first. `print` shows a table."""

    p: float
    c: float
    groups: tuple[GroupImbalance, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON types; ratios that are no number are None."""
        return {
            "p": "inf" if math.isinf(self.p) else self.p,
            "c": self.c,
            "groups": [
                {
                    "channels": g.channels,
                    "producers": list(g.producers),
                    "consumers": list(g.consumers),
                    "ratio": g.ratio if math.isfinite(g.ratio) else None,
                    "largest_log_scale": g.largest_log_scale,
                    "gap": g.gap,
                }
                for g in self.groups
            ],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        norm = "largest entries" if math.isinf(self.p) else f"l_{self.p:g} norms"
        if not self.groups:
            yield "No weight can be rescaled."
            return
        yield f"{plural(len(self.groups), 'group')}, the worst first ({norm}, c = {self.c:g})"
        rows = [("channels", "producers", "consumers", "ratio", "factors up to", "gap")]
        for g in self.groups[:_SHOWN]:
            factor = f"x {math.exp(g.largest_log_scale):.4g}"
            ratio = f"{g.ratio:.3g}" if math.isfinite(g.ratio) and g.ratio else "one side"
            names = few(g.producers), few(g.consumers)
            rows.append((str(g.channels), *names, ratio, factor, f"{g.gap:.3f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for a, b, c, *numbers in rows:
            cells = [a.rjust(widths[0]), b.ljust(widths[1]), c.ljust(widths[2])]
            cells += [n.rjust(w) for n, w in zip(numbers, widths[3:], strict=True)]
            yield "  " + "  ".join(cells)
        if len(self.groups) > _SHOWN:
            yield f"  and {plural(len(self.groups) - _SHOWN, 'more group')}: see .groups"


def imbalance(
    model_or_plan: nn.Module | Plan,
    example_inputs: Any = None,
    *,
    p: float = 2,
    c: float = 1.0,
    batchnorm: str = "affine",
) -> Imbalance:
    """Say which groups of weights are badly scaled: how far `balance` would move them.

        print(enorm_fx.imbalance(model))

    Nothing is written. Sorted by the largest factor that a channel is away from the optimum.

    p, c, example_inputs, batchnorm: as for `balance`.

    Raises ArgumentError, NonFiniteError or PlanError.
    """
    check_settings({"p": p, "c": c})
    plan = as_plan(model_or_plan, example_inputs, batchnorm)
    check_finite(plan)
    program = CarefulStep(plan, plan.groups, p=float(p), c=c, wide=True)
    program.bind_()
    with full_precision(program.device):
        descent, _ = program.measure_()
        down, up = (pull.cpu() for pull in pulls(descent))
        gap, power = gaps(descent).cpu(), descent.power
        converge_(descent, _TOLERANCE)
        moved = descent.u.abs().cpu()

    def total(logs: Tensor) -> Tensor:
        return logs.amax() if math.isinf(p) else torch.logsumexp(logs, 0) / power

    found = []
    for group in plan.groups:
        own = slice(group.start, group.start + group.channels)
        ratio = float((total(up[own]) - total(down[own])).exp())
        worst = float(moved[own].max()), float(gap[own].max())
        found.append(
            GroupImbalance(group.channels, group.producers, group.consumers, ratio, *worst)
        )
    found.sort(key=lambda g: (-g.largest_log_scale, -g.gap))
    return Imbalance(float(p), c, tuple(found))
