"""Whole models of torchvision, with random weights and statistics, in evaluation."""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from enorm_fx import analyze
from enorm_fx.model_plan import Plan
from tests.support.laws import ROUNDING, largest_change, randomized

models = pytest.importorskip("torchvision.models")

# Of the same models: the channels that brevitas 0.13.4 finds (it folds BatchNorm), where it
# misses none; alexnet and vgg have other classifiers here.
SCALES = {
    "resnet18": 2880, "resnet50": 11456, "squeezenet1_1": 2944, "googlenet": 7280,
    "densenet121": 41760, "mnasnet1_0": 18000, "mobilenet_v2": 712,
}  # fmt: skip
NAMES = ["alexnet", "vgg11", "vgg16_bn", *SCALES]


def _build(name: str) -> nn.Module:
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    if name in ("alexnet", "vgg11", "vgg16_bn"):
        with torch.device("meta"):  # 100 million weights are not needed
            model = getattr(models, name)(weights=None)
            features = model.classifier[1 if name == "alexnet" else 0].in_features
        model.features = model.features.to_empty(device="cpu")
        model.classifier = nn.Sequential(
            nn.Linear(features, 16), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(16, 10),
        )  # fmt: skip
        return model
    return getattr(models, name)(weights=None, **options)


def example() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=generator)


@functools.cache
def plan_of(name: str, batchnorm: str = "affine") -> Plan:
    model = plan_of(name).model if batchnorm == "skip" else randomized(_build(name))
    return analyze(model, example(), batchnorm=batchnorm)


@pytest.mark.parametrize("name", NAMES)
def test_random_rescalings_keep_the_outputs(name: str) -> None:
    plan = plan_of(name)
    assert plan.exact
    assert plan.num_scales > 0
    assert largest_change(plan, (example(),)) < ROUNDING


@pytest.mark.parametrize("name", SCALES)
def test_as_many_channels_as_an_independent_program_finds(name: str) -> None:
    assert plan_of(name).num_scales == SCALES[name]


def test_alexnet_and_vgg_have_every_hidden_channel() -> None:
    for name in ("alexnet", "vgg11"):
        outputs = [len(w) for w in plan_of(name).model.parameters() if w.ndim > 1]
        assert plan_of(name).num_scales == sum(outputs[:-1])


def test_vgg11_has_ten_pairs() -> None:
    plan = plan_of("vgg11")
    layers = [k for k, w in plan.model.named_parameters() if w.ndim > 1]
    found = [(pair.producer, pair.consumer) for pair in plan.pairs]
    assert found == list(pairwise(layers))
    assert len(found) == 10
    assert plan.pairs[7].via == ("relu", "max_pool2d", "adaptive_avg_pool2d", "flatten")


def test_relu6_is_named_as_what_blocks_mobilenet_v2() -> None:
    plan = plan_of("mobilenet_v2")
    reasons = {(b.weight, b.side): b.reason for b in plan.blocked}
    assert "relu6" in reasons["features.1.conv.0.1.weight", "output"]
    assert "relu6" in reasons["features.2.conv.1.0.weight", "input"]
    assert sum("relu6" in reason for reason in reasons.values()) > 30


@pytest.mark.parametrize("batchnorm", ["affine", "skip"])
def test_the_residual_stream_of_resnet18_is_one_group(batchnorm: str) -> None:
    plan = plan_of("resnet18", batchnorm)
    stream = plan.groups[0]
    affine = batchnorm == "affine"
    assert stream.channels == 64
    assert stream.producers == (
        ("bn1.weight", "layer1.0.bn2.weight", "layer1.1.bn2.weight")
        if affine
        else ("conv1.weight", "layer1.0.conv2.weight", "layer1.1.conv2.weight")
    )
    assert stream.consumers == (
        "layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.conv1.weight",
        "layer2.0.downsample.0.weight",
    )  # fmt: skip
    assert plan.exact == affine


def test_looking_through_batch_norm_is_not_exact() -> None:
    assert largest_change(plan_of("resnet18", "skip"), (example(),), trials=1) > 1e-3


def test_the_classifier_of_a_convolutional_net_takes_its_last_channels() -> None:
    plan = plan_of("resnet50")
    (last,) = [group for group in plan.groups if "fc.weight" in group.consumers]
    assert last.channels == 2048
    assert {"adaptive_avg_pool2d", "flatten"} <= set(last.via)
