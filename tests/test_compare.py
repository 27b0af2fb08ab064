"""`compare` sees what differs between two networks and not how they are rescaled."""

from __future__ import annotations

import copy
import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from enorm_fx import Comparison, analyze, canonicalize_, compare
from enorm_fx.errors import ArgumentError, NonFiniteError

WIDTHS = (4, 8, 6, 3)


class Net(nn.Module):
    """Convolutions with a residual sum, BatchNorm, a frozen weight and a mask."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf, 0.0, 0.0]))
        self.head.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = x + torch.relu(self.inner(x))
        return (self.head(x.mean((2, 3))) + self.mask).softmax(1)


def mlp() -> nn.Module:
    pairs = itertools.pairwise(WIDTHS)
    layers = [part for i, o in pairs for part in (nn.Linear(i, o), nn.LeakyReLU())]
    return nn.Sequential(*layers[:-1])


MAKERS = {"mlp": mlp, "net": Net}


def made(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(5)
    model = MAKERS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


def rescaled(model: nn.Module, seed: int) -> nn.Module:
    """A random rescaling, log scales from N(0, 1)."""
    other = copy.deepcopy(model)
    plan = analyze(other, batchnorm="affine", frozen="rescale")
    u = torch.randn(
        plan.num_scales, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    plan.rescale_(u)
    return other


def state(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", MAKERS)
def test_of_two_rescalings_nothing_is_left_in_canonical_form(kind: str) -> None:
    model = made(kind)
    a, b = rescaled(model, 1), rescaled(model, 2)
    found = compare(a, b)
    assert found.before > 0.1
    assert found.after < 1e-12
    moved = {s.name for s in analyze(a, batchnorm="affine", frozen="rescale").parameters if s.terms}
    for distance in found.tensors:
        assert (distance.before > 0.1) == (distance.name in moved), distance
        assert distance.after < 1e-12
    again = compare(b, a)
    assert [d.before for d in again.tensors] == [d.before for d in found.tensors]


def test_rounding_is_left_in_float32() -> None:
    model = made("net", torch.float32)
    found = compare(rescaled(model, 1), rescaled(model, 2))
    assert found.before > 0.1
    assert all(0 <= d.after < d.rounding == 2.0**-23 for d in found.tensors)


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "2.bias", "4.weight", "4.bias"])
def test_a_real_change_is_seen_in_its_layer(name: str) -> None:
    model = made("mlp")
    a, b = rescaled(model, 1), rescaled(model, 2)
    with torch.no_grad():
        b.get_parameter(name).view(-1)[1] *= 1.5
    found = compare(a, b)
    parts = {d.name: d.after for d in found.tensors}
    layer, _, _ = name.partition(".")
    largest = max(parts, key=lambda key: parts[key] if key.endswith("weight") else 0)
    if name.endswith("weight"):
        assert largest == f"{layer}.weight"
    else:
        assert {key for key, after in parts.items() if after > 1e-12} == {name}
    assert parts[name] > 1e-3


def test_the_numbers_are_those_of_canonicalize() -> None:
    a, b = rescaled(made("mlp"), 1), mlp().double()
    found = compare(a, b)
    a.requires_grad_(False)
    b.requires_grad_(False)
    old = zip(a.parameters(), b.parameters(), strict=True)
    before = [float((p - q).norm() / max(p.norm(), q.norm())) for p, q in old]
    for model in (a, b):
        canonicalize_(analyze(model, batchnorm="affine", frozen="rescale"))
    new = list(zip(a.parameters(), b.parameters(), strict=True))
    after = [float((p - q).norm() / max(p.norm(), q.norm())) for p, q in new]
    assert [d.before for d in found.tensors] == pytest.approx(before, rel=1e-12)
    assert [d.after for d in found.tensors] == pytest.approx(after, rel=1e-9)
    flat_a, flat_b = (torch.cat([p.detach().reshape(-1) for p in m.parameters()]) for m in (a, b))
    whole = float((flat_a - flat_b).norm() / max(flat_a.norm(), flat_b.norm()))
    assert found.after == pytest.approx(whole, rel=1e-9)


def test_both_models_stay_as_they_were() -> None:
    a, b = made("net"), rescaled(made("net"), 3).eval()
    a.inner.eval()
    old = state(a), state(b)
    modes = [m.training for m in (*a.modules(), *b.modules())]
    drawn = torch.random.get_rng_state()
    compare(a, b, torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    for now, then in zip((state(a), state(b)), old, strict=True):
        assert all(torch.equal(now[name], then[name]) for name in then)
    assert [m.training for m in (*a.modules(), *b.modules())] == modes
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_buffers_count_and_counters_do_not() -> None:
    a, b = made("net"), made("net")
    with torch.no_grad():
        b.norm.running_mean[2] += 1.0
        b.norm.num_batches_tracked += 7
    found = compare(a, b)
    assert {d.name for d in found.tensors if d.after} == {"norm.running_mean"}
    assert "norm.num_batches_tracked" not in {d.name for d in found.tensors}
    with torch.no_grad():
        b.mask[0] = -math.inf
    with pytest.raises(NonFiniteError, match="'mask' has entries that are not finite, and not"):
        compare(a, b)


def test_another_dtype_is_a_rounding() -> None:
    a = made("mlp", torch.float32)
    found = compare(a, copy.deepcopy(a).to(torch.bfloat16), torch.zeros(2, 4))
    assert all(0 < d.after < d.rounding == 2.0**-7 for d in found.tensors)


def test_the_table_and_the_json() -> None:
    model = made("mlp")
    found = compare(model, rescaled(model, 1))
    lines = str(found).splitlines()
    assert lines[0] == "6 tensors, relative l_2 distance"
    assert lines[1].split() == ["as", "they", "are", "canonical", "form"]
    assert [line.split()[0] for line in lines[2:]] == [
        "0", "0.bias", "2", "2.bias", "4", "4.bias", "all"
    ]  # fmt: skip
    data = json.loads(json.dumps(found.to_dict()))
    assert data["after"] == found.after
    assert [d["name"] for d in data["tensors"]] == [d.name for d in found.tensors]
    with pytest.raises(AttributeError):
        found.after = 0.0  # type: ignore[misc]
    deep = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    other = copy.deepcopy(deep)
    with torch.no_grad():
        other[17].bias += 1
    text = str(compare(deep, other))
    assert "17.bias" in text
    assert text.endswith("10 tensors that are closer are not shown: see .tensors")
    assert str(Comparison((), 0.0, 0.0)).startswith("0 tensors")
    assert compare(nn.ReLU(), nn.ReLU(), torch.zeros(2)) == Comparison((), 0.0, 0.0)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (nn.Sequential(nn.Linear(4, 8)), "only model_a has '2.weight', '2.bias', '4.weight' and 1"),
        (nn.Linear(4, 8), "only model_a has '0.weight'"),
        (3, "model_b must be a torch.nn.Module, not int"),
    ],
)
def test_other_architectures_are_refused(other: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        compare(made("mlp"), other)


def test_what_else_is_refused() -> None:
    model = made("mlp")
    wide, bounded, nan = mlp().double(), mlp().double(), mlp().double()
    wide[4] = nn.Linear(6, 5).double()
    with pytest.raises(ArgumentError, match=r"'4.weight' has the shape \(3, 6\) in model_a and"):
        compare(model, wide)
    bounded[1] = nn.Tanh()
    with pytest.raises(ArgumentError, match=r"'0.weight' may not be rescaled alike"):
        compare(model, bounded)
    with torch.no_grad():
        nan[2].weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"'2.weight' in model_b has entries that are not fin"):
        compare(model, nan)
    with pytest.raises(ArgumentError, match=r"'0.weight' in model_b is on the meta device"):
        compare(model, mlp().to("meta"))
