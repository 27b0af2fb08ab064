"""`fingerprint`: what networks have in common if and only if they are rescalings of each other."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from enorm_fx.analysis import analyze_traced
from enorm_fx.canonical import canonical_parts, canonical_scales
from enorm_fx.errors import ArgumentError, NonFiniteError
from enorm_fx.model_plan import Plan
from enorm_fx.plan.records import ScaledParameter
from enorm_fx.tracing.digest import Digest

_SUMS = 128  # kept of each parameter
_LIMIT = 8.0  # of `Fingerprint.distance`, up to which two networks are one
_LEAST_UNIT = 2.0**-42  # relative: the canonical form is not known better


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprint:
    """What `fingerprint` gives. `==` is true for all rescalings of one network.

    Of each network it holds a digest of what must agree exactly, and sums of weights in canonical
    form, which must agree to rounding: at most 8 by `distance`. (A digest of rounded sums would not
    do: on whatever grid, some sum lies so close to an edge that rounding takes it across.) So the
    first and the last of three fingerprints that are equal one by one may lie twice as far apart.

    `str` is for people: digits of the digest, and the norm of the canonical weights to three
    digits, the last of which can differ between rescalings where the norm lies on an edge.

    exact: digest, hexadecimal, of calls, their settings, buffers, parameters that nothing rescales.
    names: of the parameters that rescalings move.
    sums:  float64, (parameters, 128). Entry k, times a number in +-[1/4, 1) that follows from k, is
           part of sum k % 128.
    units: float64, (parameters, 128). How much a sum changes if each of its entries is rounded once
           (root mean square).
    norm:  the l_2 norm of all canonical weights in `names`.
    """

    exact: str
    names: tuple[str, ...]
    sums: Tensor
    units: Tensor
    norm: float

    def distance(self, other: Fingerprint) -> float:
        """The largest difference of a sum in units of rounding; inf if the exact parts differ.

        n rescalings move it to about sqrt(n). A weight w changed by x, in a parameter of n entries
        with root mean square r, moves it by about x / (eps * r) * sqrt(128 / n), or by about
        x / (eps * |w|) where n < 128; eps is that of the weights' dtype (1.2e-7 in float32).
        """
        if self.exact != other.exact or self.names != other.names:
            return math.inf
        if not self.names:
            return 0.0
        difference = (self.sums - other.sums).abs()
        ratios = difference / torch.hypot(self.units, other.units)
        return float(torch.where(difference == 0, 0.0, ratios).max())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint):
            return NotImplemented
        return self.distance(other) <= _LIMIT

    def __hash__(self) -> int:
        return hash(self.exact)

    def __str__(self) -> str:
        return f"{self.exact[:16]}-{self.norm:.2e}"

    def __repr__(self) -> str:
        return f"Fingerprint('{self}')"

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON types, to be kept beside a checkpoint; 3 kB for each parameter."""
        return {
            "exact": self.exact,
            "names": list(self.names),
            "sums": _as_text(self.sums),
            "units": _as_text(self.units),
            "norm": self.norm,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Fingerprint:
        """The fingerprint that `to_dict` wrote. Raises ArgumentError if it is none."""
        try:
            names = tuple(map(str, data["names"]))
            sums, units = (_from_text(data[key], len(names)) for key in ("sums", "units"))
            return Fingerprint(str(data["exact"]), names, sums, units, float(data["norm"]))
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise ArgumentError(
                f"this is no fingerprint that to_dict() wrote: {error!r}"
            ) from error


def fingerprint(model: nn.Module, example_inputs: Any = None) -> Fingerprint:
    """A mark of the network: equal for all its rescalings, different after any other change.

        before = enorm_fx.fingerprint(model)
        enorm_fx.balance(model)
        assert enorm_fx.fingerprint(model) == before

    Different: other calls or settings of calls, other buffers or parameters that nothing rescales,
    another dtype, a weight that changed by more than rescalings round it (`Fingerprint.distance`
    says how much is seen). Training or evaluation, the device, gradients, and what is frozen do
    not matter. Rescalings are those of `analyze(model, batchnorm="affine", frozen="rescale")`; one
    that takes whole units below the normal range of their dtype loses digits, and is seen.

    The model is not changed, and no random number is drawn.

    Args:
        model, example_inputs: as for `analyze`. Where shapes of inputs enter calls (a reshape to a
            batch of four), compare networks with inputs of the same shapes.

    Raises:
        ArgumentError: the model is none, or holds no data (meta device).
        NonFiniteError: a weight is not finite.
        TraceError: as for `analyze`.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    with evaluating(model):
        plan, traced = analyze_traced(model, example_inputs, batchnorm="affine", frozen="rescale")
    moved = {scaled.name: scaled for scaled in plan.parameters if scaled.terms}
    digest = Digest()
    digest.add_calls(traced)
    digest.add_state(model, moved)
    u = torch.cat([canonical_scales(plan)[0].cpu(), torch.zeros(1, dtype=torch.float64)])
    sketches = [_sketch(plan, scaled, u) for scaled in moved.values()]
    sums, units, squares = zip(*sketches, strict=True) if sketches else ((), (), ())
    empty = torch.zeros(0, _SUMS, dtype=torch.float64)
    return Fingerprint(
        digest.hexadecimal(),
        tuple(moved),
        torch.stack(sums) if sums else empty,
        torch.stack(units) if units else empty,
        math.sqrt(math.fsum(squares)),
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; afterwards each as it was."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, was in before:
            module.training = was


def _sketch(plan: Plan, scaled: ScaledParameter, u: Tensor) -> tuple[Tensor, Tensor, float]:
    """Sums, their units, and the sum of squares of a parameter in canonical form."""
    weight = plan.model.get_parameter(scaled.name).detach()
    limits = torch.finfo(weight.dtype)
    unit, smallest = max(limits.eps, _LEAST_UNIT), limits.smallest_normal * limits.eps
    sums = torch.zeros(_SUMS, dtype=torch.float64)
    variances, square, lines = torch.zeros_like(sums), 0.0, 0
    for part, factors in canonical_parts(weight, scaled, u, _SUMS):
        values = torch.zeros(-(-part.numel() // _SUMS) * _SUMS, dtype=torch.float64)
        torch.mul(part, factors, out=values[: part.numel()].view(part.shape))
        rounding = values.square()
        square += float(rounding.sum())
        rounding *= unit**2
        rounding[: part.numel()].view(part.shape).add_((smallest * factors).square())
        numbers = _numbers(torch.arange(lines, lines + len(values) // _SUMS))
        sums += numbers @ values.view(-1, _SUMS)
        variances += numbers.square() @ rounding.view(-1, _SUMS)
        lines += len(numbers)
    if not bool(sums.isfinite().all()):
        raise NonFiniteError(f"'{scaled.name}' has entries that are not finite")
    own = _numbers(torch.arange(-_SUMS, 0))
    return own * sums, own.abs() * variances.sqrt(), square


def _numbers(numbers: Tensor) -> Tensor:
    """For each integer a number in +-[1/2, 1): the same everywhere, and without pattern.

    Mixed as by Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    mixed = numbers * -0x61C8864680B583EB  # int64 wraps around
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    size = (mixed & ((1 << 52) - 1)).double() * 2.0**-53 + 0.5
    return torch.where(mixed < 0, -size, size)


def _as_text(values: Tensor) -> str:
    flat = values.reshape(-1).tolist()
    return base64.b64encode(struct.pack(f"<{len(flat)}d", *flat)).decode()


def _from_text(text: str, rows: int) -> Tensor:
    flat = struct.unpack(f"<{rows * _SUMS}d", base64.b64decode(text, validate=True))
    return torch.tensor(flat, dtype=torch.float64).reshape(rows, _SUMS)
