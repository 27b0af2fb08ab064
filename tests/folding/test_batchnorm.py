"""Folding BatchNorm keeps the function, and can be undone as far as a checkpoint goes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model

import enorm_fx
from enorm_fx.errors import PlanError
from enorm_fx.folding.batchnorm import fold_batchnorm_
from enorm_fx.folding.proof import BATCHNORMS, Calls, NotFoldedError
from enorm_fx.tracing import trace
from enorm_fx.verifying import relative_change
from tests.support.folding_kit import EXACT, IMAGES, numbers, outputs, trained
from tests.support.zoo_small import Net

C, L, B, T = nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ConvTranspose2d


def _residual(m: Any, x: Tensor) -> Tensor:
    y = m.n(m.a(x)).relu()
    return m.head((y + m.o(m.b(y)).relu()).mean((2, 3)))


def _dense(m: Any, x: Tensor) -> Tensor:
    y = m.n(m.a(x)).relu()
    return m.head(torch.cat([y, m.o(m.b(y))], 1).relu().mean((2, 3)))


def _shared(m: Any, x: Tensor) -> Tensor:
    """One head on two sizes: every call of the convolution goes to the BatchNorm."""
    y = m.n(m.a(x)).relu()
    z = m.n(m.a(F.avg_pool2d(x, 2))).relu()
    return m.head(y.mean((2, 3)) + z.mean((2, 3)))


def _skips_in_training(m: Any, x: Tensor) -> Tensor:
    y = m.n(m.a(x)).relu()
    return m.head((y if m.training else y + m.o(m.b(x))).mean((2, 3)))


class Halved(nn.Conv2d):
    """A convolution of a class of the user's, on other inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / 2)


# name -> what makes a network, its input, how many of its BatchNorms can be folded, of how many.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, int, int]] = {
    "chain": (
        lambda: nn.Sequential(C(2, 4, 3), B(4), nn.ReLU(), C(4, 3, 1, bias=False), B(3)),
        IMAGES, 2, 2,
    ),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 1)),
        numbers(3, 2, 8), 1, 1,
    ),
    "three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, 1)),
        numbers(2, 2, 4, 4, 4), 1, 1,
    ),
    "linear": (
        lambda: nn.Sequential(L(3, 5), nn.BatchNorm1d(5), nn.ReLU(), L(5, 4, False),
                              nn.BatchNorm1d(4, eps=0.1)),
        numbers(5, 3), 2, 2,
    ),
    "groups, padding, stride": (
        lambda: nn.Sequential(C(2, 6, 3, padding=1, groups=2), B(6), nn.ReLU6(),
                              C(6, 6, 3, 2, padding=1, groups=6, padding_mode="circular"), B(6)),
        IMAGES, 2, 2,
    ),
    "transposed": (
        lambda: nn.Sequential(T(2, 4, 3, bias=False), B(4), nn.ReLU(), T(4, 6, 2, 2, groups=2),
                              B(6), nn.ReLU(), T(6, 2, 2, groups=2), B(2)),
        IMAGES, 3, 3,
    ),
    "without affine parameters": (
        lambda: nn.Sequential(C(2, 4, 3, bias=False), B(4, affine=False), nn.ReLU(), C(4, 3, 1),
                              B(3, affine=False)),
        IMAGES, 2, 2,
    ),
    "residual": (
        lambda: Net(_residual, a=C(2, 4, 3, padding=1), n=B(4), b=C(4, 4, 3, padding=1, bias=False),
                    o=B(4), head=L(4, 2)),
        IMAGES, 2, 2,
    ),
    "concatenation": (
        lambda: Net(_dense, a=C(2, 4, 1), n=B(4), b=C(4, 3, 1), o=B(3), head=L(7, 2)),
        IMAGES, 2, 2,
    ),
    "BatchNorm first": (
        lambda: nn.Sequential(B(2), nn.ReLU(), C(2, 3, 1), nn.ReLU(), B(3), C(3, 3, 1), B(3)),
        IMAGES, 1, 3,
    ),
    "two in a row": (
        lambda: nn.Sequential(C(2, 3, 1), B(3), B(3), nn.ReLU(), C(3, 2, 1)),
        IMAGES, 1, 2,
    ),
    "a head that is called twice": (
        lambda: Net(_shared, a=C(2, 4, 1), n=B(4), head=L(4, 2)),
        IMAGES, 1, 1,
    ),
    "a convolution of the user's": (
        lambda: nn.Sequential(Halved(2, 3, 1, bias=False), B(3), nn.ReLU(), C(3, 2, 1)),
        IMAGES, 1, 1,
    ),
    "a branch of evaluation": (
        lambda: Net(_skips_in_training, a=C(2, 4, 1), n=B(4), b=C(2, 4, 1), o=B(4), head=L(4, 2)),
        IMAGES, 2, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_is_kept_and_every_batchnorm_accounted_for(name: str) -> None:
    make, inputs, can, there = NETWORKS[name]
    model = trained(make())
    before = outputs(model, inputs)
    folding = fold_batchnorm_(model, inputs)
    assert (len(folding.folded), len(folding.left)) == (can, there - can)
    assert relative_change(before, outputs(model, inputs)) < EXACT
    assert sum(isinstance(module, BATCHNORMS) for module in model.modules()) == there - can
    assert not any(module.training for module in model.modules())
    again = fold_batchnorm_(model, inputs)
    assert relative_change(before, outputs(model, inputs)) < EXACT
    assert len(again.folded) == (name == "two in a row")


@pytest.mark.parametrize("name", NETWORKS)
def test_as_many_scales_as_before_and_the_plan_is_sound(name: str) -> None:
    make, inputs, _, _ = NETWORKS[name]
    model = trained(make())
    before = enorm_fx.analyze(model, inputs, batchnorm="affine").num_scales
    fold_batchnorm_(model, inputs)
    plan = enorm_fx.analyze(model, inputs, batchnorm="affine")
    assert plan.num_scales >= before
    assert enorm_fx.verify(plan, inputs).largest_change < 1e-9


@pytest.mark.parametrize("name", NETWORKS)
def test_put_back_gives_a_model_of_the_same_class(name: str) -> None:
    make, inputs, can, _ = NETWORKS[name]
    model = trained(make())
    before = outputs(model, inputs)
    old = {key: value.shape for key, value in model.state_dict().items()}
    folding = fold_batchnorm_(model, inputs)
    enorm_fx.balance(model, inputs, p=float("inf"))
    folding.put_back_()
    assert {key: value.shape for key, value in model.state_dict().items()} == old
    fresh = make().double().eval()
    fresh.load_state_dict(model.state_dict())
    assert relative_change(before, outputs(fresh, inputs)) < EXACT
    assert len(fold_batchnorm_(fresh, inputs).folded) == can


@pytest.mark.parametrize("name", NETWORKS)
def test_both_front_ends_prove_the_same(name: str) -> None:
    make, inputs, _, _ = NETWORKS[name]
    model = trained(make())

    def decisions(front_end: str) -> dict[str, str | None]:
        calls = Calls(model, trace(model, inputs, front_end))
        found: dict[str, str | None] = {}
        for path, module in calls.modules.items():
            if isinstance(module, BATCHNORMS):
                try:
                    found[path] = calls.layer_before(path, module)
                except NotFoldedError:
                    found[path] = None
        return found

    assert decisions("symbolic") == decisions("export")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_other_dtypes_are_rounded_once(dtype: torch.dtype, tolerance: float) -> None:
    make, inputs, _, _ = NETWORKS["chain"]
    model = trained(make(), dtype)
    exact = copy.deepcopy(model).double()
    fold_batchnorm_(exact, inputs)
    before = outputs(model, inputs.to(dtype))
    folding = fold_batchnorm_(model, inputs.to(dtype))
    for (name, p), (_, q) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        assert p.dtype == dtype
        assert torch.equal(p, q.to(dtype)), name
    assert relative_change(before, outputs(model, inputs.to(dtype))) < tolerance
    folding.put_back_()
    assert relative_change(before, outputs(model, inputs.to(dtype))) < tolerance


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5"])
def test_published_networks(name: str) -> None:
    model = trained(get_model(name, weights=None))
    images = numbers(1, 3, 48, 48)
    before = outputs(model, images)
    folding = fold_batchnorm_(model, images)
    assert len(folding.folded) > 30
    assert not folding.left
    assert relative_change(before, outputs(model, images)) < EXACT
    folding.put_back_()
    assert relative_change(before, outputs(model, images)) < EXACT


def test_a_wrong_fold_would_be_seen() -> None:
    model = trained(nn.Sequential(C(2, 3, 1), B(3, eps=1e-3)))
    before = outputs(model, IMAGES)
    fold_batchnorm_(model, IMAGES)
    with torch.no_grad():
        model[0].weight.mul_(1 + 1e-9)  # type: ignore[operator, union-attr]
    assert relative_change(before, outputs(model, IMAGES)) > EXACT


def test_gradients_are_dropped_and_a_new_bias_is_frozen_as_its_weight_is() -> None:
    model = trained(nn.Sequential(C(2, 3, 1, bias=False), B(3), C(3, 2, 1, bias=False), B(2)))
    outputs_sum = model(IMAGES).sum()
    outputs_sum.backward()
    model[2].weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    weight = model[0].weight
    fold_batchnorm_(model, IMAGES)
    assert model[0].weight is weight
    assert all(parameter.grad is None for parameter in model.parameters())
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert trains == {"0.weight": True, "0.bias": True, "2.weight": False, "2.bias": False}


def test_put_back_refuses_a_model_that_is_another_one() -> None:
    model = trained(nn.Sequential(C(2, 3, 1, bias=False), B(3)))
    folding = fold_batchnorm_(model, IMAGES)
    model[1] = nn.ReLU()
    with pytest.raises(PlanError, match="no longer what was folded"):
        folding.put_back_()
    assert model[0].bias is not None


def test_an_eps_above_one_is_put_back_by_gamma_alone() -> None:
    model = trained(nn.Sequential(C(2, 3, 1), B(3, eps=2.0)))
    before = outputs(model, IMAGES)
    fold_batchnorm_(model, IMAGES).put_back_()
    assert relative_change(before, outputs(model, IMAGES)) < EXACT
    model = trained(nn.Sequential(C(2, 3, 1), B(3, eps=2.0, affine=False)))
    with pytest.raises(PlanError, match=r"its eps is 2\.0 and it has no gamma"):
        fold_batchnorm_(model, IMAGES).put_back_()
