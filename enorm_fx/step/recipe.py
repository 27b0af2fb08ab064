"""What a compiled step is made from, and what it promises."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from enorm_fx.step.factors import Write
from enorm_fx.step.layout import Layout


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """A layout, the tensors that it stands for now, and the settings of the descent.

    weights: by entry, detached. writes: every tensor to be multiplied, the weights among them.
    """

    layout: Layout
    weights: tuple[Tensor, ...]
    writes: tuple[Write, ...]
    p: float
    c: float
    cycles: int
    exact: bool

    @property
    def power(self) -> float:
        """What logarithms are multiplied by: p, or 1 for maxima."""
        return 1.0 if math.isinf(self.p) else self.p


class BackendStep(Protocol):
    """A step that runs again and again over the same memory."""

    @property
    def code(self) -> str:
        """The program, for people."""

    def run(self) -> Tensor | bool:
        """Measure, solve, apply. True, or a 0-dim tensor of it: every tensor was multiplied.

        False: nothing has changed, since a number was not finite or too large for the fast
        arithmetic; the caller takes the careful way (`CarefulStep`), which decides.
        """
