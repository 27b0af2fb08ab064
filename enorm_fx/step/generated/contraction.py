"""Contractions of cells with factors in a generated step: products, sums, maxima."""

from __future__ import annotations

import torch
from torch import Tensor

from enorm_fx.step.generated.cell_storage import CellStorage
from enorm_fx.step.generated.script import Script


class Contraction:
    """Writes sums over cells; largest: maxima in their place."""

    def __init__(self, script: Script, cells: CellStorage, largest: bool) -> None:
        self._script, self._cells, self._largest = script, cells, largest

    def multiply_rows(
        self,
        block: int,
        over_rows: bool,
        start: int,
        values: Tensor,
        factors: Tensor | None,
        out: Tensor,
        add: bool,
        share: float,
    ) -> None:
        """The part of a marginal that the rows of a matrix from `start` on make."""
        rows, script = slice(start, start + len(values)), self._script
        if over_rows:
            if factors is not None:
                factors = script.named(factors[rows], f"{script.name_of(factors)}_{start}")
            values = script.named(values.t(), f"{script.name_of(values)}_t")
            add = add or start > 0
        else:
            out = script.named(out[rows], f"{script.name_of(out)}_{start}")
        self.accumulate(block, values, factors, out, add, share)

    def accumulate(
        self,
        block: int,
        matrix: Tensor,
        vector: Tensor | None,
        out: Tensor,
        add: bool,
        share: float,
    ) -> None:
        """out (+)= share * matrix @ vector, over the last axis; maxima for p = inf.

        Shapes: matrix (..., n, k), vector (..., k), out (..., n), of up to one leading axis.
        """
        script = self._script
        if vector is None and (self._largest or matrix.shape[-1] == 1 or matrix.dim() == 3):
            self._reduce(matrix, out, add, share)
        elif self._largest:
            assert vector is not None
            product = self._cells.product(block, matrix)
            line = script.named(vector.unsqueeze(-2), f"{script.name_of(vector)}_row")
            script.call(torch.mul, matrix, line, out=product)
            self._reduce(product, out, add, share)
        else:
            if vector is None:
                vector = script.ones(matrix.shape[-1], matrix)
            if matrix.dim() == 3:
                vector = script.named(vector.unsqueeze(-1), f"{script.name_of(vector)}_column")
                out = script.named(out.unsqueeze(-1), f"{script.name_of(out)}_column")
            if add or share != 1:
                grow = torch.addmv if matrix.dim() == 2 else torch.baddbmm
                script.call(grow, out, matrix, vector, beta=int(add), alpha=share, out=out)
            else:
                script.call(torch.mv if matrix.dim() == 2 else torch.bmm, matrix, vector, out=out)

    def _reduce(self, values: Tensor, out: Tensor, add: bool, share: float) -> None:
        """out (+)= share * sums (maxima) of values over the last axis."""
        script = self._script
        direct = not add and share == 1
        target = out if direct else script.scratch("marginal_part", out.shape, out)
        if values.shape[-1] == 1:
            target = script.named(values.squeeze(-1), f"{script.name_of(values)}_line")
            if direct:
                script.call("copy_", out, target)
        else:
            script.call(torch.amax if self._largest else torch.sum, values, -1, out=target)
        if not direct:
            self.add_(out, target, add, share)

    def add_(self, out: Tensor, part: Tensor, add: bool, share: float) -> None:
        """out (+)= share * part, same shapes; the larger of both for p = inf."""
        script = self._script
        if share != 1:
            scaled = script.scratch("marginal_scaled", part.shape, part) if add else out
            script.call(torch.mul, part, share, out=scaled)
            part = scaled
        elif not add:
            script.call("copy_", out, part)
        if add and self._largest:
            script.call(torch.maximum, out, part, out=out)
        elif add:
            script.call("add_", out, part)
