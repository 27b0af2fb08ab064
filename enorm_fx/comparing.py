"""`compare`: how far apart two networks are, weight by weight, and how much of it is rescaling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from enorm_fx.analysis import analyze
from enorm_fx.canonical import canonical_parts, canonical_scales
from enorm_fx.errors import ArgumentError, NonFiniteError
from enorm_fx.fingerprinting import evaluating
from enorm_fx.model_plan import Plan
from enorm_fx.plan.records import ScaledParameter
from enorm_fx.report.names import figure, plural, short
from enorm_fx.step.checks import is_finite

_COUNTERS = "num_batches_tracked"  # of BatchNorm: a count of calls, no weight
_SHOWN = 30  # rows in str()
_LISTED = 3  # names in an error


@dataclass(frozen=True, slots=True)
class Distance:
    """How far apart two tensors are, relative to the larger one: |a - b| / max(|a|, |b|), l_2.

    name:     of the parameter or buffer.
    before:   as they are. 0: equal; at most 2; 1 for instance where one of them is zero.
    after:    both in canonical form; the same as before where nothing rescales them.
    rounding: the spacing of numbers at 1 in the dtype (the coarser of the two): a distance after
              of this size is rounding.
    """

    name: str
    before: float
    after: float
    rounding: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` gives. `print` shows a table.

    tensors: parameters, then buffers, each in the model's order.
    before, after: the distance over all entries of all tensors together.
    """

    tensors: tuple[Distance, ...]
    before: float
    after: float

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON types."""
        return {
            "before": self.before,
            "after": self.after,
            "tensors": [
                {"name": d.name, "before": d.before, "after": d.after, "rounding": d.rounding}
                for d in self.tensors
            ],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{plural(len(self.tensors), 'tensor')}, relative l_2 distance"
        rows = [("", "as they are", "canonical form")]
        rows += [(short(d.name), figure(d.before), figure(d.after)) for d in self.shown(_SHOWN)]
        left = len(self.tensors) - (len(rows) - 1)
        rows.append(("all together", figure(self.before), figure(self.after)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for name, *numbers in rows:
            cells = [n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True)]
            yield "  " + "  ".join([name.ljust(widths[0]), *cells])
        if left:
            yield f"  {plural(left, 'tensor')} that are closer are not shown: see .tensors"

    def shown(self, most: int) -> tuple[Distance, ...]:
        """The tensors that are furthest apart in canonical form, in the model's order."""
        worst = sorted(self.tensors, key=lambda d: (d.after, d.before), reverse=True)[:most]
        kept = {d.name for d in worst}
        return tuple(d for d in self.tensors if d.name in kept)


def compare(model_a: nn.Module, model_b: nn.Module, example_inputs: Any = None) -> Comparison:
    """Measure how far apart two networks are, as they are and both in canonical form.

        print(enorm_fx.compare(model_a, model_b))

    The canonical form is the one of `canonicalize_`, so that what a rescaling does is gone: of two
    rescalings of one network, rounding is left. A real change of a layer moves the canonical scales
    of its neighbours too, and their biases, so that some of it is seen there. Units in another
    order, and weights that nothing reads, are far apart though they compute the same.

    All is computed in float64 from the weights as they are, those that nothing rescales and buffers
    included. Both models stay as they were; no random number is drawn.

    Args:
        model_a, model_b: two models with the same names and shapes, of any dtypes and devices.
        example_inputs: as for `analyze`.

    Raises:
        ArgumentError: the models have other names, shapes or rescalings, or hold no data.
        NonFiniteError: a weight is not finite, or a buffer where that of the other model differs.
        TraceError: as for `analyze`.
    """
    for which, model in (("model_a", model_a), ("model_b", model_b)):
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"{which} must be a torch.nn.Module, not {type(model).__name__}")
    _check_alike(model_a, model_b)
    _check_numbers(model_a, "model_a")
    _check_numbers(model_b, "model_b")
    plan_a, plan_b = (_plan(model, example_inputs) for model in (model_a, model_b))
    _check_rescalings(plan_a, plan_b)
    scales = _scales(plan_a), _scales(plan_b)
    found = [
        _measure(of_a.name, (plan_a, plan_b), (of_a, of_b), scales)
        for of_a, of_b in zip(plan_a.parameters, plan_b.parameters, strict=True)
    ]
    kept = dict(model_b.named_buffers())
    found += [
        _Squares.of_fixed(name, buffer, kept[name])
        for name, buffer in model_a.named_buffers()
        if not name.endswith(_COUNTERS)
    ]
    everything = [squares.before for squares in found], [squares.after for squares in found]
    before, after = (_relative(*map(math.fsum, zip(*sums, strict=True))) if sums else 0.0
                     for sums in everything)  # fmt: skip
    return Comparison(tuple(squares.distance() for squares in found), before, after)


@dataclass(frozen=True, slots=True)
class _Squares:
    """Sums of squares of a - b, a and b, before and after the canonical form."""

    name: str
    before: tuple[float, float, float]
    after: tuple[float, float, float]
    rounding: float

    @staticmethod
    def of_fixed(name: str, a: Tensor, b: Tensor) -> _Squares:
        """Of tensors that nothing rescales. Entries of masks may be infinite, in both alike."""
        one, two = _real(a), _real(b)
        finite = one.isfinite() & two.isfinite()
        if not torch.equal(one[~finite], two[~finite]):
            raise NonFiniteError(f"'{name}' has entries that are not finite, and not the same")
        sums = _sums(one[finite], two[finite])
        return _Squares(name, sums, sums, _rounding(a, b))

    def distance(self) -> Distance:
        before, after = _relative(*self.before), _relative(*self.after)
        return Distance(self.name, before, after, self.rounding)


def _measure(
    name: str,
    plans: tuple[Plan, Plan],
    scaled: tuple[ScaledParameter, ScaledParameter],
    scales: tuple[Tensor, Tensor],
) -> _Squares:
    """The distance of one parameter, slice by slice."""
    a, b = (plan.model.get_parameter(name).detach() for plan in plans)
    if not scaled[0].terms:
        return _Squares.of_fixed(name, a, b)
    before, after = [(0.0, 0.0, 0.0)], [(0.0, 0.0, 0.0)]
    of_a, of_b = (
        canonical_parts(weight, own, u)
        for weight, own, u in zip((a, b), scaled, scales, strict=True)
    )
    for (part_a, by_a), (part_b, by_b) in zip(of_a, of_b, strict=True):
        before.append(_sums(part_a, part_b))
        after.append(_sums(part_a * by_a, part_b * by_b))
    return _Squares(name, _added(before), _added(after), _rounding(a, b))


def _added(sums: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    difference, a, b = map(math.fsum, zip(*sums, strict=True))
    return difference, a, b


def _sums(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    return float((a - b).square().sum()), float(a.square().sum()), float(b.square().sum())


def _relative(difference: float, a: float, b: float) -> float:
    return math.sqrt(difference / max(a, b)) if difference else 0.0


def _real(tensor: Tensor) -> Tensor:
    """In float64 on the CPU; complex numbers as pairs."""
    tensor = tensor.detach().cpu()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def _rounding(a: Tensor, b: Tensor) -> float:
    return max(torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0 for t in (a, b))


def _plan(model: nn.Module, example_inputs: Any) -> Plan:
    with evaluating(model):
        return analyze(model, example_inputs, batchnorm="affine", frozen="rescale")


def _scales(plan: Plan) -> Tensor:
    """Log scales to the canonical form, with the 0 at the end that `canonical_parts` wants."""
    return torch.cat([canonical_scales(plan)[0].cpu(), torch.zeros(1, dtype=torch.float64)])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _check_alike(model_a: nn.Module, model_b: nn.Module) -> None:
    """Raises ArgumentError unless names and shapes are the same."""
    of_a, of_b = _tensors(model_a), _tensors(model_b)
    for own, other, which in ((of_a, of_b, "model_a"), (of_b, of_a, "model_b")):
        alone = [name for name in own if name not in other]
        if alone:
            more = f" and {len(alone) - _LISTED} more" if len(alone) > _LISTED else ""
            names = ", ".join(f"'{name}'" for name in alone[:_LISTED])
            raise ArgumentError(
                f"only {which} has {names}{more}: two networks of one architecture are compared"
            )
    for name, tensor in of_a.items():
        if tensor.shape != of_b[name].shape:
            raise ArgumentError(
                f"'{name}' has the shape {tuple(tensor.shape)} in model_a and "
                f"{tuple(of_b[name].shape)} in model_b: two networks of one architecture are "
                "compared"
            )


def _check_numbers(model: nn.Module, which: str) -> None:
    for name, tensor in _tensors(model).items():
        if tensor.is_meta:
            raise ArgumentError(f"'{name}' in {which} is on the meta device: it has no values")
        if isinstance(tensor, nn.Parameter) and not is_finite(tensor):
            raise NonFiniteError(f"'{name}' in {which} has entries that are not finite")


def _check_rescalings(plan_a: Plan, plan_b: Plan) -> None:
    """Raises ArgumentError unless both plans say the same of every parameter."""
    for of_a, of_b in zip(plan_a.parameters, plan_b.parameters, strict=False):
        same = of_a.name == of_b.name and len(of_a.terms) == len(of_b.terms)
        for one, two in zip(of_a.terms, of_b.terms, strict=False):
            same = same and one.coefficient == two.coefficient
            same = same and torch.equal(one.index.cpu(), two.index.cpu())
        if not same:
            raise ArgumentError(
                f"'{of_a.name}' may not be rescaled alike in both models: two networks that make "
                "the same calls are compared"
            )
    if len(plan_a.parameters) != len(plan_b.parameters):
        raise ArgumentError("the models tie other parameters: they are not of one architecture")
