"""exact=True: powers of two, and outputs that are the same to the last bit, in every dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enorm_fx import analyze, balance
from enorm_fx.model_plan import Plan
from enorm_fx.step.careful import CarefulStep
from tests.support.helpers import make, outputs, same_bits, weights
from tests.support.plans import chain

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def perceptron() -> tuple[nn.Module, Any]:
    layers = [nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10)]
    return nn.Sequential(*layers), torch.randn(64, 32)


def resnet18() -> tuple[nn.Module, Any]:
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18(num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.2, 2)
            module.bias.data.normal_(0, 0.2)
    return model, torch.randn(2, 3, 48, 48)


def llama() -> tuple[nn.Module, Any]:
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        vocab_size=48, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=32,
        initializer_range=0.2,  # with activations of a trained model's size
    )  # fmt: skip
    inputs = {"input_ids": torch.randint(0, 48, (2, 16)), "use_cache": False}
    return hf.LlamaForCausalLM(config), inputs


def run(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits if isinstance(inputs, dict) else model(inputs)  # type: ignore[no-any-return]


def all_normal(plan: Plan) -> bool:
    """No number has left the range of its dtype; zeros are zeros."""
    for scaled in plan.parameters:
        weight = plan.model.get_parameter(scaled.name).detach()
        limits = torch.finfo(weight.dtype)
        size = weight.abs().double()
        good = (size == 0) | ((size >= limits.smallest_normal) & (size <= limits.max))
        if scaled.terms and not bool(good.all()):
            return False
    return True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", [perceptron, resnet18, llama])
def test_outputs_stay_to_the_last_bit(build: Any, dtype: torch.dtype) -> None:
    model, inputs = build()
    model.eval()
    plan = analyze(model, inputs, batchnorm="affine")
    plan.rescale_(1.5 * torch.randn(plan.num_scales))
    model.to(dtype)
    inputs = inputs if isinstance(inputs, dict) else inputs.to(dtype)
    before = run(model, inputs)
    report = balance(model, inputs, exact=True)
    assert report.norm_after < report.norm_before
    assert report.largest_log_scale > 0
    assert torch.equal(run(model, inputs), before)
    if dtype != torch.float16:  # some of its weights are subnormal from the start
        assert not report.held_back
        assert all_normal(plan)


def near_the_ends(dtype: torch.dtype) -> tuple[nn.Sequential, Tensor]:
    """A chain that wants to be balanced by large powers of two, with numbers near both ends.

    Layer 0 is small, layer 2 large: its units want to grow, and those of layer 2 to shrink.
    """
    limits = torch.finfo(dtype)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight.mul_(1 / 32)
        model[2].weight.mul_(32)
        model.to(dtype)
        model[0].bias[0] = 0.75 * limits.max  # unit 0 of layer 0 cannot grow
        model[2].weight[3, 1] = 1.25 * limits.smallest_normal  # cannot shrink
        model[2].weight[4, 2] = 6 * limits.smallest_normal  # can by 4
        model[0].weight[3, 0] = 0.5 * limits.smallest_normal  # subnormal: may grow
    return model, torch.full((4, 8), 2.0**-6, dtype=dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_what_would_leave_the_range_is_held_back(dtype: torch.dtype) -> None:
    model, inputs = near_the_ends(dtype)
    old = weights(model)
    report = balance(model, inputs, exact=True)
    ratios = {n: (w.double() / old[n].double()).log2() for n, w in weights(model).items()}
    assert all(bool((r == r.round()).all()) for r in ratios.values())
    moved = ratios["0.bias"]
    assert moved[0] == 0
    assert moved[3] >= 2
    assert ratios["0.weight"][3, 0] == moved[3]
    assert ratios["2.weight"][3, 1] >= 0
    assert ratios["2.weight"][4, 2] >= -2
    held = {(h.weight, h.reason): h.scales for h in report.held_back}
    name = str(dtype).removeprefix("torch.")
    assert held["0.bias", f"a number would overflow in {name}"] == 1
    assert held["2.weight", f"a number would fall below the normal range of {name}"] >= 1
    assert report.norm_after < report.norm_before


def test_without_holding_back_numbers_would_leave_the_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = near_the_ends(torch.float32)
    with torch.no_grad():
        model[0].bias[0] = 1.0
        model[0].weight[3, 0] = 1.0
    plan = analyze(model, inputs)
    monkeypatch.setattr(CarefulStep, "hold_in_range_", lambda *_: ())
    balance(plan, exact=True)
    assert not all_normal(plan)


def test_powers_of_two_are_exact_in_rescale() -> None:
    case = make("residual", seed=3)
    before, old = outputs(case), weights(case.model)
    generator = torch.Generator().manual_seed(0)
    doublings = torch.randint(-9, 10, (case.plan.num_scales,), generator=generator).double()
    case.plan.rescale_(doublings * math.log(2))
    assert torch.equal(outputs(case), before)
    ratios = torch.cat([(w / old[n]).log2().flatten() for n, w in weights(case.model).items()])
    assert bool((ratios == ratios.round()).all())
    assert float(ratios.abs().max()) > 8


@pytest.mark.parametrize(("dtype", "doublings"), [*zip(DTYPES, (115, 115, 15), strict=True)])
def test_nothing_leaves_the_range_on_its_way_to_a_number_in_it(
    dtype: torch.dtype, doublings: int
) -> None:
    """Rows times 2^k and columns by 2^-k: the weight stays, though 2^k times it does not exist."""
    case = chain([3, 4, 4, 2], seed=2)
    case.model.to(dtype)
    with torch.no_grad():
        for name in ("layer_00.weight", "layer_00.bias", "layer_01.bias"):
            case.model.get_parameter(name).mul_(1e-3)
        case.model.get_parameter("layer_01.weight")[0, 0] = 4 * torch.finfo(dtype).max ** 0.1
        case.model.get_parameter("layer_02.weight").mul_(1e3)
    old = weights(case.model)
    case.plan.rescale_(torch.full((8,), doublings * math.log(2), dtype=torch.float64))
    new = weights(case.model)
    assert math.isinf(float(old["layer_01.weight"][0, 0] * 2.0**doublings))
    assert same_bits({"w": new["layer_01.weight"]}, {"w": old["layer_01.weight"]})
    assert torch.equal(new["layer_02.weight"] * 2.0**doublings, old["layer_02.weight"])
