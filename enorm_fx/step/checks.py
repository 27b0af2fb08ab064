"""Arguments that are refused, and what is said then."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from enorm_fx.errors import ArgumentError, NonFiniteError, PlanError
from enorm_fx.plan.data import PlanData
from enorm_fx.step.memory import check_plain
from enorm_fx.step.order import ORDERS
from enorm_fx.step.shards import local

STARTS = ("balanced", "as_is")


def find_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that name now. Raises PlanError if there is none, or no plain one."""
    parameter = _parameter(model, name)
    check_plain(parameter, f"'{name}'")
    return parameter


def find_held(model: nn.Module, name: str) -> nn.Parameter:
    """The same where processes may share it: a DTensor of which this one holds a plain part."""
    parameter = _parameter(model, name)
    check_plain(local(parameter), f"'{name}'")
    return parameter


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    try:
        return model.get_parameter(name)
    except AttributeError as error:
        raise PlanError(
            f"the model has no parameter '{name}' any more; nothing was written. Analyze it again"
        ) from error


def check_settings(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if name == "c":
            if not (_is_real(value) and 0 < value < math.inf):
                raise ArgumentError(f"c must be a positive number, not {value!r}")
        elif name == "p":
            if not (_is_real(value) and value >= 1):
                raise ArgumentError(f"p must be a number >= 1 or inf, not {value!r}")
        elif name in ("cycles", "every"):
            check_count(name, value, least=1)
        elif name == "order":
            if value not in ORDERS:
                raise ArgumentError(f"order must be one of {ORDERS}, not {value!r}")
        elif name == "start":
            if value not in STARTS:
                raise ArgumentError(f"start must be one of {STARTS}, not {value!r}")
        elif not isinstance(value, bool):
            raise ArgumentError(f"{name} must be True or False, not {value!r}")


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{name} must be an integer >= {least}, not {value!r}")


def check_exact(plan: PlanData, exact: bool) -> bool:
    """Powers of two stay such under integer exponents only."""
    if exact:
        for scaled in plan.parameters:
            for term in scaled.terms:
                if term.coefficient != round(term.coefficient):
                    raise ArgumentError(
                        f"exact=True needs integer exponents, and '{scaled.name}' takes the power "
                        f"{term.coefficient:g} of a scale"
                    )
    return exact


def checked_optimizers(
    plan: PlanData, given: Optimizer | Sequence[Optimizer] | None
) -> tuple[Optimizer, ...]:
    """The optimizers whose buffers follow.

    A scaled parameter that none of them holds has no state. None at all: a mistake.
    """
    found = () if given is None else tuple(given) if isinstance(given, list | tuple) else (given,)
    for optimizer in found:
        if not isinstance(optimizer, Optimizer):
            raise ArgumentError(
                f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}"
            )
    if len({id(optimizer) for optimizer in found}) < len(found):
        raise ArgumentError("an optimizer is given twice, and its buffers would follow twice")
    scaled = [find_held(plan.model, s.name) for s in plan.parameters if s.terms]
    for optimizer in found:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if scaled and not any(id(p) in held for p in scaled):
            raise ArgumentError(
                f"the {type(optimizer).__name__} holds none of the {len(scaled)} parameters that "
                "are rescaled: was it made for another model, before parameters were replaced, or "
                "for copies of them in another precision? Analyze the model that it trains"
            )
    return found


def check_log_scales(plan: PlanData, log_scales: Tensor) -> None:
    shape = (plan.num_scales,)
    if not isinstance(log_scales, Tensor) or not log_scales.dtype.is_floating_point:
        kind = getattr(log_scales, "dtype", type(log_scales).__name__)
        raise ArgumentError(f"log_scales must be a floating point tensor of shape {shape}: {kind}")
    if tuple(log_scales.shape) != shape:
        raise ArgumentError(
            f"log_scales must have the shape {shape}, not {tuple(log_scales.shape)}"
        )
    if not bool(log_scales.isfinite().all()):
        raise ArgumentError("log_scales must be finite")


def is_finite(tensor: Tensor) -> bool:
    """Whether all entries are finite, found without a tensor of its size."""
    flat = tensor.detach().reshape(-1)
    return all(bool(piece.isfinite().all()) for piece in flat.split(1 << 20))


def check_finite(plan: PlanData) -> None:
    for scaled in plan.parameters:
        if scaled.counted and not is_finite(local(find_held(plan.model, scaled.name))):
            raise NonFiniteError(
                f"'{scaled.name}' has entries that are not finite; nothing was written"
            )
