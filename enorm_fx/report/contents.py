"""What a plan says, as one dict of JSON types, which summary, tables and page arrange."""

from __future__ import annotations

import math
from typing import Any

from enorm_fx.plan.data import PlanData
from enorm_fx.plan.records import Group


def to_dict(plan: PlanData, *, all_pairs: bool = False) -> dict[str, Any]:
    """Everything that a plan says, tensors aside: only JSON types, always in the same order.

    all_pairs: list every pair of a group, not only the direct ones (see `plan.direct_pairs`).
    """
    pairs = plan.pairs if all_pairs else plan.direct_pairs
    weights = [p for p in plan.parameters if p.counted]
    counted = {p.name for p in weights}
    one_sided = [_is_one_sided(group, counted) for group in plan.groups]
    return {
        "model": type(plan.model).__name__,
        "tracer": plan.tracer,
        "exact": plan.exact,
        "inexact_because": _inexact_because(plan),
        "notes": list(plan.notes),
        "num_scales": plan.num_scales,
        "totals": {
            "weights": len(weights),
            "entries": sum(math.prod(p.shape) for p in weights),
            "rescaled_weights": sum(bool(p.terms) for p in weights),
            "groups": len(plan.groups),
            "one_sided_groups": sum(one_sided),
            "pairs": len(pairs),
            "blocked_sides": len(plan.blocked),
        },
        "groups": [
            {
                "start": group.start,
                "channels": group.channels,
                "producers": list(group.producers),
                "consumers": list(group.consumers),
                "via": list(group.via),
                "one_sided": alone,
            }
            for group, alone in zip(plan.groups, one_sided, strict=True)
        ],
        "pairs": [
            {
                "producer": pair.producer,
                "consumer": pair.consumer,
                "channels": pair.channels,
                "via": list(pair.via),
            }
            for pair in pairs
        ],
        "blocked": [
            {
                "weight": side.weight,
                "side": side.side,
                "reason": side.reason,
                "node": side.node,
                "source": side.source,
                "chain": [
                    {"reason": step.reason, "node": step.node, "source": step.source}
                    for step in side.chain
                ],
            }
            for side in plan.blocked
        ],
        "parameters": [
            {
                "name": p.name,
                "aliases": list(p.aliases),
                "shape": list(p.shape),
                "depth": p.depth,
                "last": p.last,
                "counted": p.counted,
                "rescaled": bool(p.terms),
            }
            for p in plan.parameters
        ],
    }


def exactness(data: dict[str, Any]) -> str:
    """One sentence: is the function kept, and if not, why."""
    if data["exact"]:
        return "exact: rescaling keeps the model's function"
    because = " and ".join(data["inexact_because"])
    return f"not exact: {because}" if because else "not exact: some parameters do not follow"


def _is_one_sided(group: Group, counted: set[str]) -> bool:
    """Whether the norm has no minimum over the group: it counts weights on one side only."""
    return counted.isdisjoint(group.producers) or counted.isdisjoint(group.consumers)


def _inexact_because(plan: PlanData) -> list[str]:
    """Which choices let parameters stay where others are rescaled, read off the plan itself."""
    if plan.exact:
        return []
    reasons = []
    # With batchnorm="affine" a BatchNorm ends every path, so it is never between two weights.
    if any(op.startswith("batch_norm") for group in plan.groups for op in group.via):
        reasons.append(
            'batchnorm="skip" rescales across BatchNorm, whose parameters stay'
            ' (batchnorm="affine" is exact)'
        )
    produced = {name for group in plan.groups for name in group.producers}
    follows = {p.name for p in plan.parameters if p.terms}
    shapes = {p.name: p.shape for p in plan.parameters}
    for _, call in plan.graph.nodes(data=True):
        stay = [n for n in call["parameters"] if n not in follows and len(shapes.get(n, (0,))) == 1]
        if stay and produced.intersection(call["parameters"]):
            reasons.append('biases="skip" leaves biases as they are')
            break
    return reasons
