"""Do two models compute the same? Their outputs on random inputs, compared in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from enorm_fx.errors import ArgumentError
from enorm_fx.nested import replaced
from enorm_fx.tracing.inputs import Call
from enorm_fx.tracing.outputs import outputs_of
from enorm_fx.tracing.undisturbed import FOREIGN
from enorm_fx.verifying import (
    double_copy,
    in_double,
    independent_copy,
    outputs_in_double,
    relative_change,
)

_Runs = list[list[Tensor]]  # the outputs of each run

_TRIALS = 3  # random inputs, and as many random roundings of the weights
_ROUNDINGS = 8.0  # times what rounding all weights once changes: still the same function
_ARITHMETIC = 1e-12  # relative: what float64 outputs change by, whatever the weights' type
_BLURRED = 0.3  # a limit above this tells nothing from nothing
_NOISE = 32.0  # times as far from the float64 outputs as the other's, above which own ones differ


@dataclass(frozen=True, slots=True)
class OutputChange:
    """How far apart one output of two models is, relative to its largest entry: the largest over
    all inputs.

    double: in float64. own: in the types of the weights; None where a model does not run in them.
    """

    shape: tuple[int, ...]
    double: float
    own: float | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """What `agreement` gives.

    outputs:   in the order in which the models return them.
    limit:     how large a change in float64 is still rounding: 8 times what rounding each weight
               once in its type changes the outputs of A by.
    dtypes:    the types of the first weight of A and of B, such as "bfloat16".
    errors:    how far the outputs of A and B in their own types are from those in float64; None
               where one does not run in it.
    own_limit: how large the larger error may be: 32 times the smaller one with the type's rounding.
    skipped:   why the own types were not compared; empty if they were.
    """

    outputs: tuple[OutputChange, ...]
    limit: float
    dtypes: tuple[str, str]
    errors: tuple[float, float] | None
    own_limit: float
    skipped: str = ""

    @property
    def largest(self) -> float:
        """The largest change of an output in float64."""
        return max(output.double for output in self.outputs)

    @property
    def same_in_double(self) -> bool:
        """Whether the outputs in float64 are the same but for rounding."""
        return self.largest <= self.limit

    @property
    def same_in_own(self) -> bool:
        """Whether, in their own types, both are about as near to the float64 outputs."""
        return self.errors is None or max(self.errors) <= self.own_limit

    @property
    def same(self) -> bool:
        """Whether the two models gave the same outputs."""
        return self.same_in_double and self.same_in_own


def agreement(model_a: nn.Module, model_b: nn.Module, call: Call) -> Agreement:
    """Run two models of one architecture on the same random inputs.

    call: inputs, of which floating-point tensors are drawn anew, from N(0, 1). The models, their
    modes and the RNG are left alone.

    Raises ArgumentError where nothing can be compared: no outputs, outputs of A that are not
    finite, or outputs that rounding alone changes much.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = [in_double(call, generator, draw=True) for _ in range(_TRIALS)]
    double_a, double_b = (
        [outputs_in_double(double_copy(model), *inputs) for inputs in drawn]
        for model in (model_a, model_b)
    )
    _check(double_a, double_b)
    eps = _roundings(model_a, model_b)
    limit = _limit(model_a, eps, drawn, double_a, generator)
    own: list[_Runs] = []
    skipped = ""
    try:
        own = [[_own_outputs(model, call) for call in drawn] for model in (model_a, model_b)]
    except FOREIGN as error:  # not every operation has a form for every type
        skipped = str(error).strip().partition("\n")[0]
    errors, own_limit = None, math.inf
    if own:
        pairs = ((double_a, own[0]), (double_b, own[1]))
        first, second = (max(map(relative_change, *pair)) for pair in pairs)
        errors = first, second
        own_limit = _NOISE * (min(errors) + max(eps.values(), default=0.0))
    return Agreement(
        _changes((double_a, double_b), own), limit, (_dtype_of(model_a), _dtype_of(model_b)),
        errors, own_limit, skipped,
    )  # fmt: skip


def _check(of_a: _Runs, of_b: _Runs) -> None:
    if not any(y.numel() for outputs in of_a for y in outputs):
        raise ArgumentError("the model has no floating-point outputs: nothing can be compared")
    if not all(bool(y.isfinite().all()) for outputs in of_a for y in outputs):
        raise ArgumentError("A's outputs on random inputs are not finite: nothing can be compared")
    if any(len(a) != len(b) for a, b in zip(of_a, of_b, strict=True)):
        raise ArgumentError("A and B give different numbers of outputs")


def _roundings(model_a: nn.Module, model_b: nn.Module) -> dict[str, float]:
    """For each parameter the spacing of numbers at 1 in its type, the coarser one of A and B."""
    pairs = zip(model_a.named_parameters(), model_b.parameters(), strict=True)
    return {
        name: max(torch.finfo(t.dtype).eps for t in (a, b))
        for (name, a), b in pairs
        if a.is_floating_point() and b.is_floating_point()
    }


def _limit(
    model: nn.Module,
    eps: Mapping[str, float],
    drawn: list[Call],
    outputs: _Runs,
    generator: torch.Generator,
) -> float:
    """How much the float64 outputs may change. Raises ArgumentError where that is too much."""
    largest = 0.0
    for inputs, before in zip(drawn, outputs, strict=True):
        rounded = double_copy(model)
        with torch.no_grad():
            for name, parameter in rounded.named_parameters():
                if name in eps:
                    noise = torch.rand(parameter.shape, dtype=torch.float64, generator=generator)
                    parameter.mul_(1 + eps[name] * (noise - 0.5).to(parameter.device))
        largest = max(largest, relative_change(before, outputs_in_double(rounded, *inputs)))
    limit = max(_ARITHMETIC, _ROUNDINGS * largest)
    if not limit <= _BLURRED:
        raise ArgumentError(
            f"rounding the weights once changes the outputs by {largest:.1e}, relative to the "
            "largest: the two cannot be told apart from others by their outputs"
        )
    return limit


def _own_outputs(model: nn.Module, call: Call) -> list[Tensor]:
    """The floating-point outputs of one run in the weights' own type, as float64."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    args, kwargs = replaced(Tensor, call, convert)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        found = outputs_of(independent_copy(model)(*args, **kwargs), (args, kwargs))
        return [y.double() for y in found if y.is_floating_point()]


def _changes(double: tuple[_Runs, _Runs], own: list[_Runs]) -> tuple[OutputChange, ...]:
    return tuple(
        OutputChange(
            tuple(first.shape),
            max(_change(a[number], b[number]) for a, b in zip(*double, strict=True)),
            max(_change(a[number], b[number]) for a, b in zip(*own, strict=True)) if own else None,
        )
        for number, first in enumerate(double[0][0])
    )


def _change(before: Tensor, after: Tensor) -> float:
    return relative_change([before], [after]) if bool(before.isfinite().all()) else math.inf


def _dtype_of(model: nn.Module) -> str:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return str(dtype).removeprefix("torch.")
