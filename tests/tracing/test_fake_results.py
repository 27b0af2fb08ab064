"""Calls on fake tensors whose shapes torch's own rule refuses: they are those of the op itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enorm_fx.errors import TraceError
from enorm_fx.tracing import trace

ENDS = torch.tensor([1, 3, 4], dtype=torch.int32)


class Grouped(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(x, self.weight, offs=ends)


def test_grouped_mm_in_float32_has_the_shape_that_it_has() -> None:
    model, x = Grouped(3, 8, 4), torch.ones(4, 8)
    last = trace(model, (x, ENDS), "symbolic").nodes[-1]
    real = model(x, ENDS)
    assert (last.op, last.out.shape, last.out.dtype) == ("grouped_mm", real.shape, real.dtype)


@pytest.mark.parametrize(
    ("shape", "x"), [((3, 4, 4), torch.ones(4, 8)), ((2, 8, 4), torch.ones(4, 8))]
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], x: Tensor) -> None:
    with pytest.raises(TraceError, match="the model raised RuntimeError"):
        trace(Grouped(*shape), (x, ENDS), "symbolic")
