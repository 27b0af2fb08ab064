"""The optimizers whose steps commute with a rescaling, as numbers: what they do, how far they go.

    y <- sign * g + decay * w
    SGD               w <- w - rate * y
    with momentum     m <- keep * m + take * y,      w <- w - rate * (direct * y + through * m)
    Adam, AdamW       m <- m + take * (y - m),       v <- keep2 * v + take2 * y^2
                      w <- shrink * w - rate * m / (root * sqrt(v) + eps)
    AMSGrad           the largest v so far in the place of v

All that they read of a weight are w, its buffers and g, so an update of (w, buffers, g) and then a
rescaling is a rescaling of all three and then the update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import torch
from torch.optim import Optimizer

from enorm_fx.errors import ArgumentError

KNOWN: tuple[type[Optimizer], ...] = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
PLAIN, MOMENTUM, ADAM, AMSGRAD = range(4)  # as in native/tables.h
BUFFERS = ((), ("momentum_buffer",), ("exp_avg", "exp_avg_sq"),
           ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rates:
    """The numbers of one step, for the parameters of one group that have made as many steps."""

    sign: float = 1.0
    decay: float = 0.0
    shrink: float = 1.0
    rate: float = 0.0
    keep: float = 0.0
    take: float = 0.0
    direct: float = 0.0
    through: float = 0.0
    keep2: float = 0.0
    take2: float = 0.0
    root: float = 0.0
    eps: float = 0.0

    def finite(self) -> bool:
        return all(map(math.isfinite, numbers_of(self)))


# All of them, in their order.
numbers_of = attrgetter(*(field.name for field in fields(Rates)))
# Those of a parameter that makes no step, and is rescaled only, as of ADAM.
RESTING = Rates(shrink=1.0, keep2=1.0, eps=1.0)


def check_fusable(optimizer: Optimizer) -> None:
    """Raises ArgumentError for an optimizer whose step is not known to commute."""
    if type(optimizer) not in KNOWN:
        names = ", ".join(cls.__name__ for cls in KNOWN)
        raise ArgumentError(
            f"fused=True knows the steps of {names} of torch.optim, not that of "
            f"{type(optimizer).__name__}: use fused=False"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ArgumentError("fused=True writes in place, which differentiable=True does not allow")


def is_scaled(optimizer: Optimizer) -> bool:
    """Whether the gradients are multiples, which the optimizer divides in its step."""
    return getattr(optimizer, "grad_scale", None) is not None


def kind_of(optimizer: Optimizer, group: Mapping[str, Any]) -> int:
    """What a step of the group does: PLAIN, MOMENTUM, ADAM or AMSGRAD."""
    if isinstance(optimizer, torch.optim.SGD):
        return MOMENTUM if float(group["momentum"]) else PLAIN
    return AMSGRAD if group["amsgrad"] else ADAM


def rates_of(optimizer: Optimizer, group: Mapping[str, Any], step: float) -> Rates:
    """step: the number of this step, from 1, which only Adam asks for."""
    sign = -1.0 if group["maximize"] else 1.0
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if isinstance(optimizer, torch.optim.SGD):
        momentum = float(group["momentum"])
        direct, through = (1.0, momentum) if group["nesterov"] else (0.0, 1.0)
        take = 1 - float(group["dampening"])
        return Rates(
            sign=sign,
            decay=decay,
            rate=lr,
            keep=momentum,
            take=take,
            direct=direct,
            through=through,
        )
    beta1, beta2 = map(float, group["betas"])
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
    return Rates(
        sign=sign,
        decay=0.0 if decoupled else decay,
        shrink=1 - lr * decay if decoupled else 1.0,
        rate=_ratio(lr, 1 - beta1**step),
        take=1 - beta1,
        keep2=beta2,
        take2=1 - beta2,
        root=_ratio(1.0, math.sqrt(max(0.0, 1 - beta2**step))),
        eps=float(group["eps"]),
    )


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.inf


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bounds on |entries|: of weights, first and second means (or momentum), largest seconds."""

    weight: float
    first: float = 0.0
    second: float = 0.0
    third: float = 0.0

    def most(self) -> float:
        """NaN if one is."""
        found = (self.weight, self.first, self.second, self.third)
        return math.nan if any(map(math.isnan, found)) else max(found)

    def joined(self, other: Sizes) -> Sizes:
        pairs = zip(_values(self), _values(other), strict=True)
        return Sizes(*(math.nan if math.isnan(a) or math.isnan(b) else max(a, b) for a, b in pairs))


def _values(sizes: Sizes) -> tuple[float, float, float, float]:
    return sizes.weight, sizes.first, sizes.second, sizes.third


def after(
    kind: int, rates: Rates, held: Sizes, gradient: float, reach: float, tiny: float
) -> tuple[Sizes, float]:
    """Bounds after a step, and one on every number that comes up on the way; inf: there is none.

    reach: no factor and no inverse of one is larger. tiny: the smallest normal number.
    """
    w, m = reach * held.weight, reach * held.first
    y = reach * gradient + abs(rates.decay) * w
    v, most_v = reach * reach * held.second, reach * reach * held.third
    way = max(w, y, m, v, most_v, abs(rates.decay) * w)
    if kind == PLAIN:
        w += abs(rates.rate) * y
    elif kind == MOMENTUM:
        m = abs(rates.keep) * m + abs(rates.take) * y
        update = abs(rates.direct) * y + abs(rates.through) * m
        way = max(way, update)
        w += abs(rates.rate) * update
    else:
        way = max(way, m + y, y * y)
        m = abs(1 - rates.take) * m + abs(rates.take) * y
        v = abs(rates.keep2) * v + abs(rates.take2) * y * y
        # A second mean below zero has no root, and a weight without eps may be divided by zero.
        safe = rates.eps >= tiny and rates.keep2 >= 0 and rates.take2 >= 0
        update = abs(rates.rate) * m / rates.eps if safe else math.inf
        way = max(way, m / rates.eps if safe else math.inf, update, rates.root * math.sqrt(v))
        w = abs(rates.shrink) * w + update
        if kind == AMSGRAD:
            most_v = max(most_v, v)
    sizes = Sizes(w, m, v, most_v)
    if not rates.finite() or math.isnan(sizes.most()) or math.isnan(way):
        return Sizes(math.inf), math.inf
    return sizes, max(way, sizes.most())
