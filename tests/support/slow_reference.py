"""The same mathematics, slowly: one number per entry, Python loops, float64.

Written from the definition of J alone: it shares no code with the package but the plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from enorm_fx.model_plan import Plan
from enorm_fx.plan.records import Group


@dataclass(frozen=True)
class Entries:
    """Every counted entry: log |w| with its depth weight, and {scale: exponent}."""

    logs: list[float]
    exponents: list[dict[int, float]]


def entry_exponents(plan: Plan) -> dict[str, list[dict[int, float]]]:
    """By parameter, for each entry in flat order, the exponent of every scale that moves it."""
    out: dict[str, list[dict[int, float]]] = {}
    for scaled in plan.parameters:
        size = math.prod(scaled.shape)
        rows: list[dict[int, float]] = [{} for _ in range(size)]
        for term in scaled.terms:
            for row, scale in zip(
                rows, term.index.expand(scaled.shape).reshape(-1).tolist(), strict=True
            ):
                if scale >= 0:
                    row[scale] = row.get(scale, 0.0) + term.coefficient
        out[scaled.name] = [{k: a for k, a in row.items() if a} for row in rows]
    return out


def counted_entries(plan: Plan, c: float) -> Entries:
    exponents = entry_exponents(plan)
    logs: list[float] = []
    rows: list[dict[int, float]] = []
    for scaled in plan.parameters:
        if scaled.counted:
            weight = plan.model.get_parameter(scaled.name).detach().double().reshape(-1)
            shift = scaled.depth * math.log(c)
            logs += [math.log(abs(w)) - shift if w else -math.inf for w in weight.tolist()]
            rows += exponents[scaled.name]
    return Entries(logs, rows)


def moved(entries: Entries, u: list[float]) -> list[float]:
    return [
        log + sum(a * u[v] for v, a in row.items())
        for log, row in zip(entries.logs, entries.exponents, strict=True)
    ]


def cost(plan: Plan, p: float, c: float, u: list[float] | None = None) -> float:
    """J(u), as in the objective of the paper, by its definition."""
    entries = counted_entries(plan, c)
    logs = moved(entries, u or [0.0] * plan.num_scales)
    if math.isinf(p):
        return math.exp(max(logs))
    return math.fsum(math.exp(p * log) for log in logs)


def gradient(plan: Plan, p: float, c: float) -> list[float]:
    """dJ/du at u = 0."""
    entries = counted_entries(plan, c)
    parts: list[list[float]] = [[] for _ in range(plan.num_scales)]
    for log, row in zip(entries.logs, entries.exponents, strict=True):
        for v, a in row.items():
            parts[v].append(p * a * math.exp(p * log))
    return [math.fsum(part) for part in parts]


def descend(plan: Plan, p: float, c: float, order: str, cycles: int) -> list[float]:
    """u after coordinate descent over all groups, by the definition, channel by channel.

    In the order "alternating" a cycle moves the groups of one color, colors by turn.
    """
    entries = counted_entries(plan, c)
    u = [0.0] * plan.num_scales
    together = order == "simultaneous"
    colors = _by_color(plan)
    for cycle in range(cycles):
        start = list(u)
        groups = [group for color in colors for group in color]
        if order == "alternating":
            groups = colors[cycle % len(colors)]
        for group in groups if order in ("colored", "alternating") else plan.groups:
            logs = moved(entries, start if together else list(u))
            members = range(group.start, group.start + group.channels)
            meeting = max(sum(v in members for v in row) for row in entries.exponents)
            damping = 1 if together else max(1, meeting)
            for v in members:
                u[v] += _best_step(entries, logs, v, p) / damping
    return u


def _by_color(plan: Plan) -> list[list[Group]]:
    """Groups that share no counted weight, by color: first to last, each the least it can take."""
    moves = [
        {
            scaled.name
            for scaled in plan.parameters
            if scaled.counted
            for term in scaled.terms
            if ((term.index >= g.start) & (term.index < g.start + g.channels)).any()
        }
        for g in plan.groups
    ]
    colors: list[int] = []
    for g, own in enumerate(moves):
        taken = {colors[h] for h in range(g) if moves[h] & own}
        colors.append(min(set(range(g + 1)) - taken))
    return [
        [group for group, own in zip(plan.groups, colors, strict=True) if own == color]
        for color in range(max(colors, default=-1) + 1)
    ]


def _best_step(entries: Entries, logs: list[float], v: int, p: float) -> float:
    """argmin over s of what is moved by scale v, by bisection on the sign of the slope."""
    cells = [
        (log, row[v])
        for log, row in zip(logs, entries.exponents, strict=True)
        if v in row and log > -math.inf
    ]
    if not any(a > 0 for _, a in cells) or not any(a < 0 for _, a in cells):
        return 0.0
    low, high = -100.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        if _slope(cells, middle, p) > 0:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def _slope(cells: list[tuple[float, float]], s: float, p: float) -> float:
    """The sign of d/ds, from terms that are scaled to the largest: nothing overflows."""
    logs = [log + a * s for log, a in cells]
    if math.isinf(p):
        up = max(x for x, (_, a) in zip(logs, cells, strict=True) if a > 0)
        return up - max(x for x, (_, a) in zip(logs, cells, strict=True) if a < 0)
    top = max(logs)
    return math.fsum(a * math.exp(p * (x - top)) for x, (_, a) in zip(logs, cells, strict=True))


def apply(plan: Plan, u: list[float]) -> dict[str, Tensor]:
    """Every parameter after the rescaling, float64; the model is not touched."""
    out = {}
    for name, rows in entry_exponents(plan).items():
        weight = plan.model.get_parameter(name).detach().double()
        factors = [math.exp(sum(a * u[v] for v, a in row.items())) for row in rows]
        out[name] = weight * torch.tensor(factors, dtype=torch.float64).view(weight.shape)
    return out
