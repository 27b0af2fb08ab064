"""ReLU instead of ReLU6: what is replaced, what is reported, and how much the outputs change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import enorm_fx
from enorm_fx.errors import ArgumentError, TraceError
from enorm_fx.folding.relu6 import replace_relu6_
from enorm_fx.verifying import relative_change
from tests.support.folding_kit import IMAGES, outputs, trained
from tests.support.zoo_small import Net

C = nn.Conv2d


def _network() -> nn.Module:
    return trained(
        nn.Sequential(C(2, 4, 3), nn.ReLU6(True), C(4, 4, 3), nn.Hardtanh(0, 6), C(4, 2, 1))
    )


def test_the_change_of_the_outputs_is_reported() -> None:
    model = _network()
    before = outputs(model, 5 * IMAGES)
    report = replace_relu6_(model, 5 * IMAGES)
    assert report.replaced == ("1", "3")
    assert report.left == ()
    assert report.change == pytest.approx(relative_change(before, outputs(model, 5 * IMAGES)))
    assert report.change > 0.01
    assert "THE FUNCTION IS ANOTHER ONE: 2 ReLU6 are ReLU" in str(report)
    assert [type(model[i]) for i in (1, 3)] == [nn.ReLU, nn.ReLU]  # type: ignore[index]
    assert (model[1].inplace, model[3].inplace) == (True, False)  # type: ignore[index]
    assert not any(module.training for module in model.modules())


def test_inputs_that_never_reach_6_change_nothing() -> None:
    report = replace_relu6_(_network(), 1e-3 * IMAGES)
    assert report.change == 0


def test_what_comes_after_can_be_equalized() -> None:
    model = _network()
    assert enorm_fx.analyze(model, IMAGES).num_scales == 0
    replace_relu6_(model, IMAGES)
    plan = enorm_fx.analyze(model, IMAGES)
    assert plan.num_scales == 8
    assert enorm_fx.verify(plan, IMAGES).largest_change < 1e-9


def test_functions_and_hooks_stay_and_are_reported() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        y: Tensor = m.c(F.relu6(m.b(m.act(m.a(x)))).clamp(0, 6) + m.hooked(x).sum())
        return y.clamp(0, 1)

    hooked = nn.ReLU6()
    hooked.register_forward_hook(lambda module, args, output: None)
    model = trained(
        Net(run, a=C(2, 4, 1), act=nn.ReLU6(), b=C(4, 4, 1), c=C(4, 2, 1), hooked=hooked)
    )
    report = replace_relu6_(model, IMAGES)
    assert report.replaced == ("act",)
    assert [(entry.module, entry.reason.partition(" at ")[0]) for entry in report.left] == [
        ("hooked", "it has hooks"), ("", "it calls 'relu6'"), ("", "it calls 'clamp'"),
    ]  # fmt: skip
    assert type(model.hooked) is nn.ReLU6


def test_a_shared_module_stays_one_and_others_stay() -> None:
    shared = nn.ReLU6()
    model = trained(
        nn.Sequential(C(2, 3, 1), shared, C(3, 3, 1), shared, nn.Hardtanh(), C(3, 2, 1))
    )
    report = replace_relu6_(model)
    assert report.replaced == ("1", "3")
    assert model[1] is model[3]  # type: ignore[index]
    assert type(model[4]) is nn.Hardtanh  # type: ignore[index]


@pytest.mark.parametrize(
    ("model", "inputs", "error"),
    [
        (3, None, ArgumentError),
        (nn.Sequential(C(2, 3, 1, device="meta"), nn.ReLU6()), None, ArgumentError),
        (nn.Sequential(C(2, 3, 1), nn.ReLU6()), torch.zeros(1, 3, 4, 4), TraceError),
    ],
)
def test_after_an_error_nothing_has_changed(
    model: nn.Module, inputs: Tensor | None, error: type[Exception]
) -> None:
    with pytest.raises(error):
        replace_relu6_(model, inputs)
    if isinstance(model, nn.Module):
        assert type(model[1]) is nn.ReLU6  # type: ignore[index]
