"""The plan that users hold: what an analysis found, with the verbs on top."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from enorm_fx.plan.data import PlanData
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

    def rescale_(self, log_scales: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Rescale the model in place by u = log_scales, shape (num_scales,): all or nothing.

        The optimizer's buffers follow. Raises ArgumentError for a wrong shape or values that are
        not finite, NonFiniteError, OptimizerStateError, PlanError; nothing is written then.
        """
        rescale_(self, log_scales, optimizer)

    def to_dict(self, *, all_pairs: bool = False) -> dict[str, Any]:
        """Everything that was found, tensors aside, in JSON types.

        all_pairs: list `pairs` instead of `direct_pairs`.
        """
        return to_dict(self, all_pairs=all_pairs)

    def __str__(self) -> str:
        return summary(self)
