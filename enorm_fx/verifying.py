"""Check a plan numerically, on a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from enorm_fx.errors import ArgumentError
from enorm_fx.model_plan import Plan
from enorm_fx.nested import replaced
from enorm_fx.tracing.double_calls import DoubleCalls
from enorm_fx.tracing.inputs import Call, as_call
from enorm_fx.tracing.outputs import outputs_of
from enorm_fx.tracing.undisturbed import FOREIGN

_SPREAD = 0.3  # standard deviation of the random log scales


@dataclass(frozen=True, slots=True)
class Verification:
    """What random rescalings did to the outputs.

    largest_change: max |y' - y| / max |y| over all outputs and trials (dimensionless).
    trials:         how many random rescalings were tried.
    exact:          what the plan claims: with an exact plan the change is rounding alone.
    """

    largest_change: float
    trials: int
    exact: bool


def verify(plan: Plan, example_inputs: Any = None, *, trials: int = 3) -> Verification:
    """Rescale a float64 copy of the model at random and measure how much its outputs change.

    The model itself, its mode and the RNG are left alone. Without example inputs, random ones of
    the shapes that the analysis used are drawn.

    Args:
        plan: what `analyze` returned.
        example_inputs: as for `analyze`; floating-point tensors are used in float64.
        trials: number of random rescalings, log scales drawn from N(0, 0.3).

    Raises:
        ArgumentError: trials < 1, or the outputs are not finite before any rescaling.
    """
    if trials < 1:
        raise ArgumentError(f"trials must be at least 1, not {trials}")
    model = double_copy(plan.model)
    generator = torch.Generator().manual_seed(0)
    _fill_zeros(model, generator)
    call = plan.inputs if example_inputs is None else as_call(example_inputs)
    args, kwargs = in_double(call, generator, draw=example_inputs is None)
    before = outputs_in_double(model, args, kwargs)
    if not all(bool(y.isfinite().all()) for y in before):
        raise ArgumentError("the model's outputs are not finite: verify with other inputs")
    if not any(y.numel() for y in before):
        raise ArgumentError("the model's outputs have no entries: verify with other inputs")
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}
    on_copy = replace(plan, model=model)
    largest = 0.0
    for _ in range(trials):
        u = _SPREAD * torch.randn(plan.num_scales, dtype=torch.float64, generator=generator)
        on_copy.rescale_(u)
        largest = max(largest, relative_change(before, outputs_in_double(model, args, kwargs)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(saved[name])
    return Verification(largest, trials, plan.exact)


def double_copy(model: nn.Module) -> nn.Module:
    """A copy in float64 and in the same mode, which shares nothing with the model."""
    return independent_copy(model).double()


def independent_copy(model: nn.Module) -> nn.Module:
    """A copy in the same mode, which shares nothing with the model.

    What a layer computed from its parameters and keeps beside them (the weight of
    `torch.nn.utils.weight_norm`) is copied as a number: the layer computes it anew in every call.
    """
    kept = (t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor))
    copied: dict[int, Any] = {id(t): t.detach().clone() for t in kept if not t.is_leaf}
    return copy.deepcopy(model, copied)


def _fill_zeros(model: nn.Module, generator: torch.Generator) -> None:
    """Parameters that are zero everywhere hide what comes before them; the plan holds for any."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not bool(parameter.any()):
                noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
                parameter.copy_(0.1 * noise)


def relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    """max |after - before| / max |before|, the largest over all outputs; inf where not finite."""
    largest = 0.0
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape or not bool(new.isfinite().all()):
            return float("inf")
        if old.numel():
            change = (new - old).abs().max().item()
            size = old.abs().max().item()
            largest = max(largest, change / size if size else (float("inf") if change else 0.0))
    return largest


def in_double(call: Call, generator: torch.Generator, draw: bool) -> Call:
    """The same call in float64; draw: with random floating-point tensors of the same shapes."""

    def convert(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if draw:
            values = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
            return values.to(tensor.device)
        return tensor.detach().double()

    return replaced(Tensor, call, convert)  # type: ignore[no-any-return]


def outputs_in_double(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    """The floating-point outputs of one run; the same dropout masks every time."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _double_by_default():
        torch.manual_seed(0)
        try:
            with DoubleCalls():
                outputs = model(*args, **kwargs)
        except FOREIGN as error:
            raise ArgumentError(
                f"the float64 copy of the model raised {type(error).__name__}: {error}"
            ) from error
        return [t for t in outputs_of(outputs, (args, kwargs)) if t.is_floating_point()]


@contextmanager
def _double_by_default() -> Iterator[None]:
    """Tensors that the model makes as it runs are float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
