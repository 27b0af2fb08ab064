"""Laws of the fingerprint: rescalings do not change it, everything else does."""

from __future__ import annotations

import copy
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from enorm_fx import Fingerprint, analyze, balance, canonical, fingerprint
from enorm_fx.errors import ArgumentError, NonFiniteError, TraceError
from tests.support.zoo_networks import NETWORKS, built
from tests.support.zoo_small import ZOO

SMALL = {small.name: small for small in ZOO}
SOME = [
    "mlp", "prelu", "conv chain", "batch norm", "layer norm", "transposed grouped conv", "residual",
    "depthwise separable", "dense block", "gated by relu", "multi-head attention", "layer scale",
    "shared layer", "index buffer", "embedding",
]  # fmt: skip


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 6 * 6, 16),
        nn.Dropout(),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


IMAGE = torch.zeros(2, 3, 8, 8)


def mark(model: nn.Module) -> Fingerprint:
    return fingerprint(model, IMAGE)


def rescale_(model: nn.Module, inputs: object, seed: int, size: float = 2.0) -> None:
    plan = analyze(model, inputs, batchnorm="affine", frozen="rescale")
    generator = torch.Generator().manual_seed(seed)
    plan.rescale_(size * torch.randn(plan.num_scales, generator=generator, dtype=torch.float64))


# ---- rescalings ----


@pytest.mark.parametrize("name", [*SOME, *list(NETWORKS)[::3]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rescalings_have_one_fingerprint(name: str, dtype: torch.dtype) -> None:
    if name in SMALL:
        model, inputs = SMALL[name].build(), SMALL[name].inputs()
    else:
        shared, inputs = built(name)
        model = copy.deepcopy(shared)
    model.to(dtype)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    before = fingerprint(model, inputs)
    rescale_(model, inputs, seed=1)
    after = fingerprint(model, inputs)
    assert before.distance(after) < 2
    assert before == after
    assert hash(before) == hash(after)
    balance(model, inputs)
    assert fingerprint(model, inputs) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_rescalings(dtype: torch.dtype) -> None:
    model, texts = small_net().to(dtype), set()
    image = IMAGE.to(dtype)
    before, old = fingerprint(model, image), copy.deepcopy(model.state_dict())
    for seed in range(30):
        model.load_state_dict(old)
        rescale_(model, image, seed, size=2.0 if dtype == torch.float32 else 1.0)
        after = fingerprint(model, image)
        assert before.distance(after) < 2
        texts.add(str(after))
    assert texts == {str(before)}


def test_rounding_adds_up_slowly() -> None:
    model = small_net()
    before = mark(model)
    for seed in range(25):
        rescale_(model, IMAGE, seed, size=0.5)
    assert 0.5 < before.distance(mark(model)) <= 8


def test_mode_gradients_and_what_is_frozen_do_not_matter() -> None:
    model = small_net()
    before = mark(model.train())
    assert mark(model.eval()).distance(before) == 0
    model[0].requires_grad_(False)
    model(IMAGE).sum().backward()
    with torch.no_grad():
        assert mark(model).distance(before) == 0


def test_it_is_the_same_in_another_process() -> None:
    code = "from tests.test_fingerprint import *; print(json.dumps(mark(small_net()).to_dict()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert Fingerprint.from_dict(json.loads(found.stdout)).distance(mark(small_net())) == 0


# ---- everything else ----


def _one_weight(model: nn.Module, name: str, change: float) -> None:
    with torch.no_grad():
        weight = model.get_parameter(name)
        typical = float(weight.square().mean().sqrt())
        flat = weight.view(-1)
        flat[int((flat.abs() - typical).abs().argmin())] *= 1 + change


@pytest.mark.parametrize("change", [1e-3, 1e-4])
@pytest.mark.parametrize(
    "name",
    ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "6.weight", "9.weight", "9.bias"],
)
def test_one_weight_that_changes_is_seen(name: str, change: float) -> None:
    model = small_net()
    with torch.no_grad():
        model[1].bias.normal_()
    before = mark(model)
    _one_weight(model, name, change)
    rescale_(model, IMAGE, seed=1)
    assert mark(model) != before


def _swapped(model: nn.Module) -> None:
    with torch.no_grad():
        flat = model.get_parameter("6.weight").view(-1)
        flat[[3, 131]] = flat[[131, 3]]  # both in one sum


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "two weights change places": _swapped,
    "a sign": lambda m: m[9].weight.data[0].neg_(),
    "all weights a little": lambda m: m[6].weight.data.add_(1e-5 * torch.randn(16, 288)),
    "a zero": lambda m: m[3].weight.data[0, 0, 0, 0].zero_(),
    "a statistic": lambda m: m[1].running_mean[2].add_(1e-7),
    "a counter": lambda m: m[1].num_batches_tracked.add_(1),
    "a bias that stays": lambda m: m[9].bias.data[0].add_(1e-7),
    "a setting": lambda m: setattr(m[1], "eps", 1e-3),
    "an activation": lambda m: m.__setitem__(2, nn.LeakyReLU(0.01)),
    "padding": lambda m: (setattr(m[0], "padding", (2, 2)), setattr(m[0], "dilation", (2, 2))),
    "another name": lambda m: m.add_module("9x", m._modules.pop("9")),
    "another dtype": lambda m: m.double().float().bfloat16(),
    "another buffer": lambda m: m.register_buffer("more", torch.zeros(1)),
    "a factor for all": lambda m: m[9].weight.data.mul_(1.001),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen(what: str) -> None:
    model = small_net()
    before = mark(model)
    CHANGES[what](model)
    after = fingerprint(model, IMAGE.to(model[0].weight.dtype))
    assert after != before
    assert before.distance(after) > 8


def test_constants_in_code_count() -> None:
    class Net(nn.Module):
        def __init__(self, order: list[int], factor: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)
            self.order, self.factor = order, factor

        def forward(self, x: Tensor) -> Tensor:
            kept = self.one(x).relu()[:, torch.tensor(self.order)]
            return self.two(self.factor * kept)  # type: ignore[no-any-return]

    first = fingerprint(Net([0, 1, 2, 3], 0.5), torch.zeros(2, 3))
    assert fingerprint(Net([0, 1, 2, 3], 0.5), torch.zeros(2, 3)) == first
    assert fingerprint(Net([1, 0, 2, 3], 0.5), torch.zeros(2, 3)) != first
    assert fingerprint(Net([0, 1, 2, 3], 0.25), torch.zeros(2, 3)) != first


# ---- the object ----


def test_it_is_kept_in_json() -> None:
    model = small_net()
    found = mark(model)
    back = Fingerprint.from_dict(json.loads(json.dumps(found.to_dict())))
    assert back == found
    assert back.distance(found) == 0
    assert (str(back), repr(back)) == (str(found), f"Fingerprint('{found}')")
    _one_weight(model, "6.weight", 1e-3)
    assert back != mark(model)


@pytest.mark.parametrize(
    "broken",
    [{"names": None}, {"sums": "!"}, {"units": "AAAA"}, {"norm": "x"}, {"exact": None, "sums": 3}],
)
def test_what_is_no_fingerprint_is_refused(broken: dict[str, object]) -> None:
    data = {**mark(small_net()).to_dict(), **broken}
    with pytest.raises(ArgumentError, match="no fingerprint that to_dict"):
        Fingerprint.from_dict(data)
    with pytest.raises(ArgumentError, match="no fingerprint that to_dict"):
        Fingerprint.from_dict({})


def test_it_compares_with_fingerprints_alone() -> None:
    found = mark(small_net())
    assert found != str(found)
    assert found in {mark(small_net())}
    plain = fingerprint(nn.Linear(3, 2))
    assert plain.names == ()
    assert plain != found
    assert plain != fingerprint(nn.Linear(3, 2))


def test_nothing_is_disturbed() -> None:
    model = small_net()
    model[3].eval()
    old = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    numbers, python = torch.random.get_rng_state(), random.getstate()
    mark(model)
    assert all(torch.equal(v, old[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert random.getstate() == python
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("chunk", [1, 300, 5000])
def test_slices_make_no_difference(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    model = small_net()
    whole = mark(model)
    monkeypatch.setattr(canonical, "_CHUNK", chunk)
    sliced = mark(model)
    assert float((sliced.sums - whole.sums).abs().max()) < 1e-14 * float(whole.sums.abs().max())
    assert torch.allclose(sliced.units, whole.units, rtol=1e-12)


def test_the_norm_is_that_of_the_canonical_weights() -> None:
    model = small_net()
    found = mark(model)
    balance(model, IMAGE)
    state = dict(model.named_parameters())
    squares = sum(float(state[name].detach().double().square().sum()) for name in found.names)
    assert found.norm == pytest.approx(math.sqrt(squares), rel=1e-6)
    assert str(found).endswith(f"-{found.norm:.2e}")


# ---- what is refused ----


def test_what_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"must be a torch\.nn\.Module, not str"):
        fingerprint("model")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"'0.weight' holds no plain data"):
        fingerprint(small_net().to("meta"), IMAGE.to("meta"))
    model = small_net()
    model.train()
    with pytest.raises(TraceError):
        fingerprint(model, torch.zeros(2, 5))
    assert model.training
    with torch.no_grad():
        model[3].bias[1] = torch.inf
    with pytest.raises(NonFiniteError, match=r"'3.bias' has entries that are not finite"):
        mark(model)
