"""Rules of the user's own, for modules that torch's calls do not describe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import enorm_fx
from enorm_fx import rules
from enorm_fx.symmetry.labels import Label

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


class Kernel(torch.autograd.Function):
    """As good as a kernel of one's own: nobody can look inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.linear(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


class FusedLinearReLU(nn.Module):
    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_out, fan_in))
        self.bias = nn.Parameter(torch.randn(fan_out))

    def forward(self, x: Tensor) -> Any:
        return Kernel.apply(x, self.weight, self.bias)


def fused_linear_relu(ctx: rules.Context, x: Label, weight: Label, bias: Label) -> Any:
    return rules.elementwise.homogeneous(ctx, rules.linear.linear(ctx, x, weight, bias))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(FusedLinearReLU(3, 4), FusedLinearReLU(4, 5), nn.Linear(5, 2))


def test_without_a_rule_it_is_pinned_and_named() -> None:
    plan = enorm_fx.analyze(model(), X)
    assert plan.num_scales == 0
    assert any("Kernel" in blocked.reason for blocked in plan.blocked)


def test_with_a_rule_its_scales_are_found() -> None:
    plan = enorm_fx.analyze(model(), X, rules={FusedLinearReLU: fused_linear_relu})
    assert [(p.producer, p.consumer) for p in plan.pairs] == [
        ("0.weight", "1.weight"),
        ("1.weight", "2.weight"),
    ]
    assert plan.num_scales == 4 + 5
    assert enorm_fx.verify(plan, X).largest_change < 1e-12


def test_a_wrong_rule_is_seen_by_verify() -> None:
    def careless(ctx: rules.Context, x: Label, weight: Label, bias: Label) -> Any:
        return rules.linear.linear(ctx, x, weight, None)  # forgets that the bias follows

    plan = enorm_fx.analyze(model(), X, rules={FusedLinearReLU: careless})
    assert enorm_fx.verify(plan, X).largest_change > 1e-3


def test_parameters_that_a_rule_gives_no_label_keep_their_values() -> None:
    net = model()
    before = net[0].bias.detach().clone()  # type: ignore[index]
    plan = enorm_fx.analyze(
        net, X, rules={FusedLinearReLU: lambda ctx, x, weight, bias: NotImplemented}
    )
    plan.rescale_(torch.ones(plan.num_scales))
    assert torch.equal(net[0].bias, before)  # type: ignore[index]


def test_the_module_is_left_as_it_was() -> None:
    net = model()
    keys = set(net[0].__dict__)  # type: ignore[index]
    enorm_fx.analyze(net, X, rules={FusedLinearReLU: fused_linear_relu})
    assert set(net[0].__dict__) == keys  # type: ignore[index]


def test_torch_export_cannot_keep_a_module_whole() -> None:
    with pytest.raises(enorm_fx.EnormError, match="symbolic"):
        enorm_fx.analyze(model(), X, rules={FusedLinearReLU: fused_linear_relu}, tracer="export")
