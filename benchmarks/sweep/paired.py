"""The paired t test of figures that were taken seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def paired_p(first: Sequence[float], second: Sequence[float]) -> float:
    """The two-sided p of Student's paired t test: equal means, if differences are normal.

    Two or more pairs. 1 where all differences are 0; 0 where they are equal and not 0.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    if deviation == 0:
        return float(mean == 0)
    freedom = len(differences) - 1
    return two_sided(mean / deviation * math.sqrt(len(differences)), freedom)


def two_sided(t: float, freedom: int) -> float:
    """P(|T| > |t|) for Student's t with an integer number of degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= power / (power + 1) * cosine**2
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1 - inside)
