"""AWQ's scales: of some powers of the mean activation the one that quantizes best.

For a channel whose activation is X on the mean, s = X^r divides the activation and multiplies the
weights W that read it; r is that of a grid for which what quantized weights give, Q(W s) X / s,
comes nearest to W X (Lin et al., arXiv:2306.00978).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor

from enorm_fx.calibration.choice import SmoothableGroup
from enorm_fx.errors import NonFiniteError

RATIOS = tuple(r / 20 for r in range(21))


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """What is tried.

    logs:   log scales u of the plan for each ratio, float64 (ratios, num_scales).
    groups: for each chosen group the number of its part; weights: the same by weight. Groups that
            one weight reads are one part, and share a ratio: the error of a quantized weight
            depends on all of its columns. Scales of its rows leave it as it is.
    """

    logs: Tensor
    groups: tuple[int, ...]
    weights: dict[str, int]


def make_candidates(
    num_scales: int, chosen: Sequence[SmoothableGroup], means: Tensor, limit: float
) -> Candidates:
    """Scales for every ratio. means: mean |x| by scale; where it is 0 or NaN, u stays 0.

    limit: of |log s|.
    """
    logs = torch.zeros(len(RATIOS), num_scales, dtype=torch.float64)
    ratios = torch.tensor(RATIOS, dtype=torch.float64)[:, None]
    graph = nx.Graph()
    for number, smoothed in enumerate(chosen):
        graph.add_edges_from((number, reader.parameter.name) for reader in smoothed.readers)
        mean = smoothed.of(means)
        alive = mean > 0
        if bool(alive.any()):
            known = mean[alive].log()
            log_s = ratios * (mean.log() - (known.max() + known.min()) / 2)
            log_s = torch.where(alive, log_s, 0.0).clamp(-limit, limit)
            smoothed.of(logs).copy_(-log_s / smoothed.power)
    part_of = {node: p for p, nodes in enumerate(nx.connected_components(graph)) for node in nodes}
    groups = tuple(part_of[number] for number in range(len(chosen)))
    return Candidates(logs, groups, {n: p for n, p in part_of.items() if isinstance(n, str)})


def best_ratios(candidates: Candidates, errors: Tensor) -> list[int]:
    """For each chosen group the number of the ratio with the smallest error, the smallest such.

    errors: (parts, ratios). Raises NonFiniteError where they are not finite.
    """
    for name, part in candidates.weights.items():
        if not bool(errors[part].isfinite().all()):
            raise NonFiniteError(
                f"the output of '{name}' is not finite with quantized weights; nothing was written"
            )
    best = errors.argmin(1).tolist()
    return [best[part] for part in candidates.groups]
