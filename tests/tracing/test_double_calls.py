"""Calls in float64 that torch has no kernel for."""

import pytest
import torch
from torch.nn import functional as F

from enorm_fx import analyze, verify
from enorm_fx.errors import ArgumentError
from enorm_fx.tracing.double_calls import DoubleCalls
from tests.support.language_models import build, inputs

FUNCTIONS = [f for f in (getattr(F, "grouped_mm", None), torch._grouped_mm) if f is not None]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("ends", [[2, 5, 7], [0, 7, 7], [1, 3, 4]])
def test_grouped_products_agree_with_one_product_a_row(function, ends):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 16, dtype=torch.float64, generator=generator)
    matrices = torch.randn(3, 16, 8, dtype=torch.float64, generator=generator)
    with DoubleCalls():
        found = function(x, matrices, offs=torch.tensor(ends, dtype=torch.int32))
    for row, (given, got) in enumerate(zip(x, found, strict=True)):
        expert = sum(row >= end for end in ends)
        expected = given @ matrices[expert] if expert < 3 else torch.zeros_like(got)
        torch.testing.assert_close(got, expected)


def test_calls_that_torch_has_are_its_own():
    x, matrices = torch.randn(4, 16), torch.randn(2, 16, 8)
    ends = torch.tensor([1, 4], dtype=torch.int32)
    expected = torch._grouped_mm(x, matrices, offs=ends)
    with DoubleCalls():
        found = torch._grouped_mm(x, matrices, offs=ends)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        with pytest.raises(RuntimeError):  # types that do not fit stay an error
            torch._grouped_mm(x.double(), matrices, offs=ends)


def test_a_plan_of_packed_experts_is_verified_and_a_wrong_one_rejected():
    plan = analyze(build("mixtral"), inputs(), batchnorm="affine")
    assert verify(plan).largest_change < 1e-9
    with torch.no_grad():
        plan.model.get_parameter("model.layers.0.mlp.experts.down_proj").fill_(torch.nan)
    with pytest.raises(ArgumentError, match="not finite"):
        verify(plan)
