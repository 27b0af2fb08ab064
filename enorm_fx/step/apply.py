"""Apply: scales that somebody chose, to a model and its optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from enorm_fx.plan.data import PlanData
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.checks import check_log_scales, checked_optimizers
from enorm_fx.step.precision import full_precision


def rescale_(
    plan: PlanData,
    log_scales: Tensor,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    buffers: Mapping[str, int] | None = None,
) -> None:
    """Multiply every entry by exp(sum of its terms), in place, all or nothing.

    log_scales: real floating point, (plan.num_scales,), finite: natural logarithms.
    optimizer, buffers: as for `ENorm`. Gradients in `.grad` become g / factor.

    Raises ArgumentError, NonFiniteError, OptimizerStateError or PlanError, with nothing written.
    """
    check_log_scales(plan, log_scales)
    optimizers = checked_optimizers(plan, optimizer)
    careful = CarefulStep(plan, None)
    careful.bind_()
    with full_precision(careful.device):
        u = careful.zeros()
        u[:-1] = log_scales.detach()
        writes = careful.collect(optimizers, buffers, gradients=True)
        careful.apply_(u, careful.sizes(), writes)
