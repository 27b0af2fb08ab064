"""Whether every number stays finite: decided before the first write."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from enorm_fx.errors import NonFiniteError
from enorm_fx.step.factors import Factors, FactorTable, Write, largest_after, usable
from enorm_fx.step.layout import Entry, Layout
from enorm_fx.step.measure import max_abs, measure_


@dataclass(frozen=True, slots=True, eq=False)
class Range:
    """What the numbers of a step must stay within.

    entries: of the weights that move, as this process holds them.
    rates:   float64 (entries,): the most that max |u| counts for in log |w|.
    limits:  float64 (entries,): the log of the largest number of the weight's dtype.
    """

    entries: Sequence[Entry]
    table: FactorTable
    rates: Tensor
    limits: Tensor
    p: float

    @classmethod
    def of(
        cls,
        layout: Layout,
        held: Sequence[Entry],
        table: FactorTable,
        parameters: Sequence[nn.Parameter],
        p: float,
        device: torch.device,
    ) -> Range:
        rates = [entry.rate for entry in layout.entries]
        limits = [math.log(torch.finfo(parameter.dtype).max) for parameter in parameters]
        return cls(
            held,
            table,
            torch.tensor(rates, dtype=torch.float64, device=device),
            torch.tensor(limits, dtype=torch.float64, device=device),
            p,
        )

    def check(
        self,
        u: Tensor,
        sizes: Tensor,
        writes: Iterable[Write],
        factors: Factors,
        weights: Iterable[Tensor],
    ) -> None:
        """Raises NonFiniteError where a weight is not finite, or would not be afterwards.

        u:       log scales, (num_scales + 1,).
        sizes:   bounds on max |w|, (entries,), not finite where the weight is not.
        weights: what this process holds of them, by entry.
        """
        # A factor is at most exp(rate * max |u|), and |w| after the step at most size times that.
        # One transfer brings all answers.
        in_range = sizes.log().clamp(min=0.0) + self.rates * u.abs().amax() < self.limits
        flags = [usable(factors, u.device), u.isfinite().all(), in_range.all()]
        answers = torch.cat([torch.stack(flags), sizes.isfinite()]).tolist()
        for entry, weight, finite in zip(self.entries, weights, answers[3:], strict=True):
            if not finite:
                raise _not_finite(entry, weight, self.p)
        if not (answers[0] and answers[1]):
            raise NonFiniteError(
                "a scale factor leaves the range of its dtype (largest |log factor| "
                f"{float((u.abs().amax() * self.rates.amax()).item()):.3g}); nothing was written. "
                "Use smaller log scales, or look for weights of very unequal size"
            )
        if not answers[2]:
            self._check_cells(writes, factors)

    def _check_cells(self, writes: Iterable[Write], factors: Factors) -> None:
        """The exact form of the bound: maxima per cell times their factors."""
        for write in writes:
            if write.exponent != 1:
                continue
            entry = self.entries[write.entry]
            wide = torch.promote_types(write.tensor.dtype, torch.float32)
            cells = torch.empty(entry.cells, dtype=wide, device=write.tensor.device)
            measure_(write.tensor, entry, math.inf, cells)
            largest = float(largest_after(write, entry, self.table, factors, cells))
            if not largest <= torch.finfo(write.tensor.dtype).max:
                raise NonFiniteError(
                    f"'{entry.name}' would reach {largest:.3g}, beyond {write.tensor.dtype}; "
                    "nothing was written"
                )


def _not_finite(entry: Entry, weight: Tensor, p: float) -> NonFiniteError:
    bad = int((~weight.isfinite()).sum())
    if bad:
        return NonFiniteError(
            f"'{entry.name}' has {bad} entries that are not finite; nothing was written"
        )
    if not weight.numel() or math.isfinite(float(max_abs(weight) ** p)):
        return NonFiniteError(
            f"'{entry.name}' is not finite in the part of another process; nothing was written"
        )
    return NonFiniteError(
        f"'{entry.name}' is finite, but the sum of |w|^{p:g} over it overflows; nothing was written"
    )
