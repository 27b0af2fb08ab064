"""Converge: cycle after cycle, until the optimum is reached to the last digits.

A cycle of coordinate descent settles each unit among its neighbours, the coarse correction whole
groups. What is left are modes in which both are slow (chains of grouped convolutions, gates). There
the last few cycles tell where they lead: Anderson, Iterative procedures for nonlinear integral
equations, J. ACM 1965; Walker and Ni, Anderson acceleration for fixed-point iterations, SIAM J.
Numer. Anal. 2011. Where a prediction does harm it is forgotten, and plain cycles go on, which only
lower J.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from enorm_fx.step.coarse import Coarse, correct_, make_coarse, unbounded
from enorm_fx.step.descent import Descent, alive, imbalance, sweep_, with_peaks

MAX_CYCLES = 1000
_SETTLED = 1e-13  # the gap that cycles go on to, below tol
_ROUNDING = 8  # cycles that do not lower a gap below tol: rounding is all that is left of it
_LOOK = 4  # p = inf: the gap is looked at after cycles whose steps are at most so many times tol
_REMEMBERED = 6  # cycles that a prediction is made from
_NEAR = 1.0  # predictions begin after a cycle that moves no log scale by more
_PATIENCE = 25  # cycles without a smaller gap, after which predictions end


def converge_(
    descent: Descent,
    tol: float,
    watch: Callable[[int, float], None] | None = None,
    *,
    polish: bool = True,
) -> tuple[int, float]:
    """Move u to the optimum: the number of cycles, and the gap that is left (see `imbalance`).

    polish: where the gap has come to tol, cycles go on until it is at most 1e-13 or as small as
    rounding admits: a few more, after which networks that are rescalings of each other have the
    same weights. After MAX_CYCLES cycles it stops anyway.

    p = inf: the maxima of all channels may be balanced in many ways. Cycles start from the optimum
    of the cells' l_2 norm, which is unique, so they end in the same weights as well; in which ones,
    the order of the groups decides. They stop as soon as the gap is at most tol.

    watch: told the cycles so far and the gap, at the beginning and after each cycle.
    """
    if math.isinf(descent.p):
        return _balance_maxima_(descent, tol, watch, polish)
    coarse, predictor = _make_coarse_(descent), Predictor()
    gap = smallest = float(imbalance(descent))
    cycles = lowered = 0  # lowered: the cycle after which the gap was smallest
    while cycles < MAX_CYCLES:
        if watch is not None:
            watch(cycles, gap)
        # Negated, so that NaN ends it: who applies the scales says which weight is not finite.
        settled = not polish or not gap > _SETTLED or cycles - lowered >= _ROUNDING
        if not gap > tol and settled:
            break
        start = predictor.predict(descent.u) if cycles - lowered <= _PATIENCE else descent.u
        descent.u = start.clone()
        sweep_(descent, exact=False)
        correct_(descent, coarse)
        predictor.learn(start, descent.u)
        cycles, gap = cycles + 1, float(imbalance(descent))
        if gap < smallest:
            smallest, lowered = gap, cycles
    return cycles, gap


def _balance_maxima_(
    descent: Descent, tol: float, watch: Callable[[int, float], None] | None, polish: bool
) -> tuple[int, float]:
    squares = [values.square() for values in descent.values]
    smooth = Descent(descent.layout, squares, 2.0, descent.c, descent.u)
    cycles, _ = converge_(smooth, tol, watch, polish=polish)
    descent.u = smooth.u
    peaks = with_peaks(descent)  # which moves the same u
    gap = float(imbalance(peaks))
    while gap > tol and cycles < MAX_CYCLES:
        before = peaks.u.clone()
        sweep_(peaks, exact=False)
        # A step is about as large as the gap that it closes: while steps are large, so is the gap.
        gap = float((peaks.u - before).abs().amax())
        if not gap > _LOOK * tol:
            gap = float(imbalance(peaks))
        cycles += 1
        if watch is not None:
            watch(cycles, gap)
    return cycles, gap if gap <= tol else float(imbalance(peaks))


def _make_coarse_(descent: Descent) -> Coarse:
    """The coarse problem of the groups that have a minimum; the others leave the descent."""
    while True:
        coarse = make_coarse(descent, alive(descent))
        runaway = unbounded(descent, coarse)
        if not runaway:
            return coarse
        layout = descent.layout
        kept = [g for number, g in enumerate(layout.groups) if number not in runaway]
        turns = tuple((number,) for number in range(len(kept)))
        descent.layout = replace(layout, groups=tuple(kept), batches=turns)


class Predictor:
    """Where cycles lead, from the last few of them."""

    def __init__(self) -> None:
        self._ends: list[Tensor] = []
        self._steps: list[Tensor] = []

    def learn(self, start: Tensor, end: Tensor) -> None:
        """A cycle went from start to end."""
        step = (end - start).cpu()
        if self._steps and not step.norm() <= 2 * self._steps[-1].norm():
            self._ends, self._steps = [], []  # it came from a bad prediction, or all else did
        if float(step.abs().max()) <= _NEAR:
            self._ends = [*self._ends[-_REMEMBERED:], end.clone()]
            self._steps = [*self._steps[-_REMEMBERED:], step]

    def predict(self, u: Tensor) -> Tensor:
        """The combination of the last ends whose steps would cancel best; u if there is none."""
        if len(self._steps) < 2:
            return u
        steps = torch.stack(self._steps, 1)
        weights = torch.linalg.lstsq(steps.diff(dim=1), steps[:, -1:], driver="gelsd").solution
        moves: Tensor = torch.stack(self._ends, 1).diff(dim=1) @ weights.to(u)
        return u - moves.squeeze(1)
