"""A call of `optimizer.step`: whether it writes, and when its gradients are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def will_write(optimizer: Optimizer) -> bool:
    """Whether the step under way updates weights; asked in a hook of the step.

    A GradScaler that has found gradients which are not finite does not call the step, but for fused
    optimizers: these get `found_inf` and write nothing.
    """
    found = getattr(optimizer, "found_inf", None)
    return not (isinstance(found, Tensor) and bool(found))


def followed_by(
    action: Callable[[], None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments of `step` with a closure that the action follows; None if there is no closure.

    args: the optimizer first, as hooks get them.
    """
    if callable(closure := kwargs.get("closure")):
        return args, {**kwargs, "closure": _then(closure, action)}
    if len(args) > 1 and callable(args[1]):
        return (args[0], _then(args[1], action), *args[2:]), kwargs
    return None


def _then(first: Callable[[], Any], second: Callable[[], None]) -> Callable[[], Any]:
    def both() -> Any:
        result = first()
        second()
        return result

    return both
