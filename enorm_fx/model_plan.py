"""The plan that users hold: what an analysis found, with the verbs on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from enorm_fx.plan.data import PlanData
from enorm_fx.plan.smoothing_pairs import SmoothingPair, smoothing_pairs
from enorm_fx.report.contents import to_dict
from enorm_fx.report.summary import summary
from enorm_fx.step.apply import rescale_
from enorm_fx.step.measure import objective


@dataclass(frozen=True, slots=True, eq=False)
class Plan(PlanData):
    """What `analyze` found. Immutable; only `rescale_` writes, and it writes into the model."""

    @classmethod
    def of(cls, data: PlanData) -> Plan:
        """The same plan with the verbs."""
        return cls(**{f.name: getattr(data, f.name) for f in fields(data) if f.init})

    def norm(self, p: float = 2, c: float = 1.0) -> float:
        """The objective J of the weights as they are now (dimensionless).

        p: p >= 1 or inf; c: weighs a weight of depth k by c ** (-p * k).
        """
        return objective(self, p, c)

    def rescale_(
        self,
        log_scales: Tensor,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    ) -> None:
        """Rescale the model in place by u = log_scales, shape (num_scales,): all or nothing.

        Multiples of log 2 (in float64) multiply by powers of two, to the last bit. Buffers of
        the optimizer, or of several, follow. Raises ArgumentError for a wrong shape or values that
        are not finite, NonFiniteError, OptimizerStateError, PlanError; nothing is written then.
        """
        rescale_(self, log_scales, optimizer)

    def smoothing_pairs(self, method: str = "awq") -> tuple[SmoothingPair, ...]:
        """The groups as pairs of modules, for implementations of SmoothQuant and AWQ.

        Each pair has the path of the module whose outputs are to be divided by scales
        (`smooth_layer`) and those of all linear layers that read them (`balance_layers`). Groups
        that are more than that are left out: several producers, convolutions, grouped queries,
        where one value channel goes with several columns. `smooth` takes them all.

        method: "awq": every such pair; where a packed projection makes other things too (q, k and
            v), the last of its outputs are meant, as AWQ implementations have it.
            "smoothquant": only pairs in which the layers read what the module gives unchanged,
            which is where implementations of SmoothQuant measure it.

        Raises ArgumentError for another method, or if the plan is not exact.
        """
        return smoothing_pairs(self, method)

    def to_dict(self, *, all_pairs: bool = False) -> dict[str, Any]:
        """Everything that was found, tensors aside, in JSON types.

        all_pairs: list `pairs` instead of `direct_pairs`.
        """
        return to_dict(self, all_pairs=all_pairs)

    def __str__(self) -> str:
        return summary(self)
