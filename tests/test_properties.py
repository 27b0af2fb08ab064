"""Random networks: whatever is drawn, a random rescaling keeps its function."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from enorm_fx import analyze
from enorm_fx.rules.shape import reshape_ids
from tests.support.laws import ROUNDING, count_symmetries, largest_change, randomized

ACTIVATIONS = [nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Tanh, nn.ReLU6]
ALWAYS = {"deadline": None, "derandomize": True}


@st.composite
def block(draw: Any, channels: int) -> tuple[nn.Module, int]:
    """A convolution, perhaps grouped, perhaps normalized, pooled or padded."""
    outputs = draw(st.sampled_from([2, 3, 4, 6]))
    groups = draw(st.sampled_from([g for g in (1, 1, 2, 3) if channels % g == outputs % g == 0]))
    size = draw(st.sampled_from([1, 3]))
    layers: list[nn.Module] = [
        nn.Conv2d(channels, outputs, size, padding=size // 2, groups=groups,
                  bias=draw(st.booleans()))
    ]  # fmt: skip
    if draw(st.booleans()):
        layers.append(nn.BatchNorm2d(outputs, affine=draw(st.booleans())))
    layers.append(draw(st.sampled_from(ACTIVATIONS))())
    kind = draw(st.sampled_from(["plain", "plain", "pool", "mean", "dropout", "shuffle"]))
    if kind == "pool":
        layers.append(nn.MaxPool2d(3, 1, 1))
    elif kind == "mean":
        layers.append(nn.AvgPool2d(3, 1, 1))
    elif kind == "dropout":
        layers.append(nn.Dropout2d(0.5))
    elif kind == "shuffle":
        layers.append(nn.ChannelShuffle(2 if outputs % 2 == 0 else 1))
    return nn.Sequential(*layers), outputs


class Joined(nn.Module):
    """Two branches from one place that meet again."""

    def __init__(self, how: str, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.how, self.left, self.right = how, left, right

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x), self.right(x)
        if self.how == "cat":
            return torch.cat([a, b], dim=1)
        if self.how == "gate":
            return a * b.sigmoid()
        return a * b if self.how == "mul" else a - b if self.how == "sub" else a + b


@st.composite
def network(draw: Any) -> nn.Module:
    channels, layers = 2, []
    for _ in range(draw(st.integers(1, 4))):
        part, outputs = draw(block(channels))
        how = draw(st.sampled_from(["chain", "chain", "add", "sub", "cat", "mul", "gate", "skip"]))
        if how == "chain":
            layers.append(part)
        elif how == "cat":
            other, more = draw(block(channels))
            layers.append(Joined("cat", part, other))
            outputs += more
        elif how == "skip" and outputs == channels:
            layers.append(Joined("add", part, nn.Identity()))
        else:
            other = nn.Conv2d(channels, outputs, 1, bias=draw(st.booleans()))
            layers.append(Joined("add" if how == "skip" else how, part, other))
        channels = outputs
    if draw(st.booleans()):
        layers += [
            nn.AdaptiveAvgPool2d(draw(st.sampled_from([1, 2]))),
            nn.Flatten(),
            nn.LazyLinear(3),
        ]
    else:
        layers.append(nn.Conv2d(channels, 2, 1))
    model = nn.Sequential(*layers)
    with torch.no_grad():
        model(torch.randn(2, 2, 4, 4))
    return randomized(model)


def images(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@settings(max_examples=60, **ALWAYS)
@given(model=network())
def test_random_rescalings_keep_random_networks(model: nn.Module) -> None:
    inputs = (images(2, 2, 4, 4),)
    plan = analyze(model, inputs, batchnorm="affine")
    assert plan.exact
    assert largest_change(plan, inputs) < ROUNDING


@settings(max_examples=25, **ALWAYS)
@given(model=network().filter(lambda m: sum(p.numel() for p in m.parameters()) < 250))
def test_random_networks_have_no_further_symmetry(model: nn.Module) -> None:
    inputs = (images(8, 2, 4, 4),)
    plan = analyze(model, inputs, batchnorm="affine")
    saturated = any(isinstance(m, nn.ReLU6) for m in model.modules())
    if not saturated:  # numbers of order one hardly reach 6, so it looks homogeneous
        assert plan.num_scales == count_symmetries(model, inputs)
    assert plan.num_scales <= count_symmetries(model, inputs)


@st.composite
def reshaping(draw: Any) -> tuple[list[int], list[int]]:
    """Two shapes with equally many entries."""
    primes = draw(st.lists(st.sampled_from([2, 2, 3, 5]), max_size=5))

    def shape() -> list[int]:
        sizes = [1] * draw(st.integers(1, 4))
        for prime in draw(st.permutations(primes)):
            sizes[draw(st.integers(0, len(sizes) - 1))] *= prime
        return sizes

    return shape(), shape()


@settings(max_examples=300, **ALWAYS)
@given(shapes=reshaping(), kept=st.integers(0, 15))
def test_ids_reshape_as_the_tensor_does(shapes: tuple[list[int], list[int]], kept: int) -> None:
    old, new = shapes
    small = [n if kept >> a & 1 else 1 for a, n in enumerate(old)]
    ids = torch.arange(math.prod(small)).reshape(small)
    found = reshape_ids(ids, old, new)
    assert all(a in (1, b) for a, b in zip(found.shape, new, strict=True))
    assert torch.equal(found.expand(new), ids.expand(old).reshape(new))


def test_ids_of_size_one_stay_small() -> None:
    ids = torch.arange(64).reshape(1, 64, 1, 1)
    assert reshape_ids(ids, [128, 64, 7, 7], [128, 64 * 49]).shape == (1, 64 * 49)
    assert reshape_ids(ids, [128, 64, 7, 7], [128, 64, 49]).shape == (1, 64, 1)
    assert reshape_ids(ids, [128, 64, 7, 7], [2, 64, 64, 49]).shape == (1, 1, 64, 1)


@settings(max_examples=30, **ALWAYS)
@given(
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    bias=st.booleans(),
    slope=st.sampled_from([0.0, 0.2, -0.5]),
)
def test_a_chain_has_one_scale_for_every_hidden_unit(
    widths: list[int], bias: bool, slope: float
) -> None:
    sizes = [3, *widths, 2]
    layers = [nn.Linear(a, b, bias) for a, b in pairwise(sizes)]

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers[:-1]:
                x = F.leaky_relu(layer(x), slope)
            return self.layers[-1](x)

    plan = analyze(randomized(Chain()), images(4, 3))
    assert plan.num_scales == sum(widths)
    assert [group.channels for group in plan.groups] == widths
    assert len(plan.pairs) == len(widths)
