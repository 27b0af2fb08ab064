"""From ENorm's settings to what its calls run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from enorm_fx.errors import ArgumentError
from enorm_fx.plan.data import PlanData
from enorm_fx.plan.records import Group
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.checks import check_exact
from enorm_fx.step.fused.optimizers import check_fusable
from enorm_fx.step.fused.step import FusedStep
from enorm_fx.step.layout import Turns, alternating_turns
from enorm_fx.step.notes import Notes
from enorm_fx.step.runner import ConvergingRunner, StepRunner


@dataclass(frozen=True, slots=True, eq=False)
class Maker:
    """settings: c, p, cycles, order, last_layer, exact and converge, as of ENorm.

    wanted: the backend that is asked for. deferred: check="async".
    """

    plan: PlanData
    settings: Mapping[str, Any]
    optimizers: tuple[Optimizer, ...]
    buffers: Mapping[str, int]
    wanted: str
    deferred: bool
    notes: Notes = field(default_factory=Notes)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups that a step may move."""
        plan = self.plan
        if self.settings["last_layer"]:
            return plan.groups
        moved = torch.zeros(plan.num_scales + 1, dtype=torch.bool)
        for scaled in plan.parameters:
            if scaled.last:
                for term in scaled.terms:
                    moved[term.index.cpu().reshape(-1)] = True
        moved[-1] = False
        return tuple(g for g in plan.groups if not moved[g.start : g.start + g.channels].any())

    def check(self, fused: bool) -> None:
        """Raises ArgumentError for settings that do not go together."""
        converge = self.settings["converge"]
        check_exact(self.plan, self.settings["exact"])
        if converge and self.wanted not in ("auto", "eager"):
            raise ArgumentError(
                f"converge=True runs as torch operations, not by backend={self.wanted!r}: leave "
                "backend at 'auto'"
            )
        if not fused:
            if self.wanted == "triton":
                raise ArgumentError(
                    "backend='triton' is for steps inside the optimizer's: pass fused=True, or "
                    "leave backend at 'auto'"
                )
            return
        if len(self.optimizers) != 1:
            raise ArgumentError(
                "fused=True needs the optimizer, and one only: pass ENorm(model, optimizer)"
            )
        check_fusable(self.optimizers[0])
        if not self.plan.exact:
            raise ArgumentError(
                "fused=True needs a plan that keeps the function, and this one does not "
                "(batchnorm='skip' across a BatchNorm): there a gradient does not follow from the "
                "one before the rescaling. Analyze with batchnorm='affine', or use fused=False"
            )
        if converge:
            raise ArgumentError("fused=True makes cycles, and converge=True makes none: choose one")
        if self.deferred or self.wanted == "cudagraph":
            raise ArgumentError(
                "fused=True looks at gradients before it writes: leave check at 'sync' and backend "
                "at 'auto'"
            )

    def steps(self) -> tuple[StepRunner | ConvergingRunner, ...]:
        """What calls run, one after the other and then again from the first."""
        if self.settings["converge"]:
            return (
                ConvergingRunner(
                    self.to_optimum(), self.optimizers, self.buffers, exact=self.settings["exact"]
                ),
            )
        return tuple(
            StepRunner(
                self._careful(order, wide=False),
                self.optimizers,
                self.buffers,
                cycles=cycles,
                backend=self.wanted,
                deferred=self.deferred,
                notes=self.notes,
            )
            for order, cycles in self._orders()
        )

    def fused(self, optimizer: Optimizer) -> FusedStep:
        """What runs inside the optimizer's step."""
        orders = self._orders()
        return FusedStep(
            [self._careful(order, wide=False) for order, _ in orders],
            optimizer,
            self.buffers,
            cycles=orders[0][1],
            p=float(self.settings["p"]),
            backend=self.wanted,
            notes=self.notes,
        )

    def to_optimum(self) -> CarefulStep:
        """What measures in float64 and solves for all groups, whatever the order of the steps."""
        return self._careful("sequential", wide=True)

    def _orders(self) -> list[tuple[str | Turns, int]]:
        """Order and cycles of the calls, one after the other and then again from the first."""
        order, cycles = self.settings["order"], self.settings["cycles"]
        if order != "alternating":
            return [(order, cycles)]
        turns = alternating_turns(self.plan, self.groups)
        count = len(turns)
        # A call with several turns begins where the one before it has ended.
        starts = [tuple(turns[(k + j) % count] for j in range(cycles)) for k in range(count)]
        return [(found, 1) for found in starts] or [((), 1)]

    def _careful(self, order: str | Turns, wide: bool) -> CarefulStep:
        settings, active = self.settings, self.groups
        if not isinstance(order, str):
            moved = {group.start for turn in order for group in turn}
            active = tuple(group for group in active if group.start in moved)
        return CarefulStep(
            self.plan,
            active,
            p=float(settings["p"]),
            c=settings["c"],
            order=order,
            exact=settings["exact"],
            wide=wide,
        )
