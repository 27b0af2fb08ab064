"""Several optimizers over one model, and weights that are copies of others in more precision."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enorm_fx import ENorm, analyze, register_optimizer_state
from enorm_fx.errors import ArgumentError, OptimizerStateError
from enorm_fx.step.optimizer_state import exponents
from tests.support.helpers import BACKENDS, buffers, largest_error, same_bits, weights
from tests.support.three_layers import INPUTS, three_layers


def two(model: Any) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """SGD for the first and the last layer, Adam for the one between."""
    ends = [*model[0].parameters(), *model[4].parameters()]
    return torch.optim.SGD(ends, lr=0.05, momentum=0.9), torch.optim.Adam(model[2].parameters())


def train(model: nn.Module, optimizers: Any, steps: int = 1) -> None:
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(INPUTS).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def states(model: nn.Module, optimizers: Any) -> dict[tuple[str, str], Tensor]:
    return {
        (name, key): value.clone()
        for optimizer in optimizers
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
        if value.shape == p.shape
    }


def assert_followed(
    model: nn.Module, optimizers: Any, old: dict[str, Tensor], before: dict[Any, Tensor]
) -> None:
    """Every buffer of every optimizer has taken its power of the weight's factor."""
    powers = {"momentum_buffer": -1, "exp_avg": -1, "exp_avg_sq": -2}
    after = states(model, optimizers)
    assert {key for _, key in after} == set(powers)
    for (name, key), value in after.items():
        factor = dict(model.named_parameters())[name].detach() / old[name]
        assert torch.allclose(value, before[name, key] * factor ** powers[key], rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_buffers_of_all_optimizers_follow(backend: str) -> None:
    model = three_layers()
    optimizers = two(model)
    enorm = ENorm(analyze(model), optimizers, start="as_is", backend=backend)
    for number in range(4):
        train(model, optimizers)
        if number == 2:  # states are other tensors from now on, and must be found
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
        old, before = weights(model), states(model, optimizers)
        enorm.step()
        assert largest_error(weights(model), old) > 1e-6
        assert_followed(model, optimizers, old, before)


def test_the_law_tells_an_optimizer_that_is_not_given() -> None:
    model = three_layers()
    optimizers = two(model)
    enorm = ENorm(analyze(model), optimizers[0], start="as_is")
    train(model, optimizers)
    old, before = weights(model), states(model, optimizers)
    enorm.step()
    with pytest.raises(AssertionError):
        assert_followed(model, optimizers, old, before)


def test_rescale_takes_several_and_so_does_the_start() -> None:
    model = three_layers()
    optimizers = two(model)
    plan = analyze(model)
    train(model, optimizers, 2)
    old, before = weights(model), states(model, optimizers)
    plan.rescale_(torch.linspace(-1, 1, plan.num_scales, dtype=torch.float64), optimizers)
    assert_followed(model, optimizers, old, before)
    old, before = weights(model), states(model, optimizers)
    enorm = ENorm(plan, optimizers)
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = 0.0
        group["momentum"] = 0.0
    optimizers[1].step()  # the first of them to step begins with the start
    assert enorm.state_dict()["started"]
    enorm.step()
    other = three_layers()
    other.load_state_dict(old)
    reference = ENorm(analyze(other))
    reference.step()
    reference.step()
    assert largest_error(weights(model), weights(other)) < 1e-9


def test_attached_it_follows_the_last_one_and_makes_the_same_bits() -> None:
    ends = []
    for attached in (False, True):
        model = three_layers()
        optimizers = two(model)
        enorm = ENorm(analyze(model), list(optimizers))
        if attached:
            enorm.attach()
        for _ in range(3):
            train(model, optimizers)
            if not attached:
                enorm.step()
        assert enorm.state_dict()["calls"] == 3
        enorm.detach()
        ends.append({**weights(model), **buffers(optimizers[0]), **buffers(optimizers[1])})
    assert same_bits(*ends)


@pytest.mark.parametrize(
    ("case", "message"),
    [("twice", "given twice"), ("other", "the SGD holds none"), ("fused", "one only"),
     ("no optimizer", "must be a torch.optim.Optimizer, not str")],
)  # fmt: skip
def test_what_is_no_list_of_the_models_optimizers_is_an_error(case: str, message: str) -> None:
    model = three_layers()
    one, other = two(model)
    given: dict[str, Any] = {
        "twice": [one, one],
        "other": [one, torch.optim.SGD(three_layers().parameters())],
        "fused": [one, other],
        "no optimizer": [one, "adam"],
    }
    with pytest.raises(ArgumentError, match=message):
        ENorm(analyze(model), given[case], fused=case == "fused")


# ---- bfloat16 weights whose float32 originals an optimizer keeps ----


class MasterSGD(torch.optim.Optimizer):
    """Keeps the weights in float32 and steps these; the model's are rounded copies."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                master = state.setdefault("master", p.float())
                momentum = state.setdefault("momentum", torch.zeros_like(master))
                momentum.mul_(0.9).add_(p.grad.float())
                master.sub_(momentum, alpha=group["lr"])
                p.copy_(master)


class Known(MasterSGD):
    """The same, registered."""


register_optimizer_state(Known, {"master": 1, "momentum": -1})


def half_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(INPUTS.bfloat16()).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("exact", [False, True])
def test_the_originals_of_bfloat16_weights_follow(exact: bool) -> None:
    model = three_layers().bfloat16()
    with torch.no_grad():
        model[0].weight *= 16
    optimizer = Known(model.parameters(), lr=0.01)
    enorm = ENorm(analyze(model, INPUTS[:2].bfloat16()), optimizer, exact=exact)
    for _ in range(3):
        half_step(model, optimizer)
        old = {p: s["master"].clone() for p, s in optimizer.state.items()}
        enorm.step()
        for p in model.parameters():
            rounded = optimizer.state[p]["master"].bfloat16()
            if exact:
                assert torch.equal(p, rounded)
            else:  # both are rounded, the weight once more
                assert torch.allclose(p, rounded, rtol=2**-7, atol=0)
    if not exact:
        assert any((optimizer.state[p]["master"] != master).any() for p, master in old.items())
    assert exponents(optimizer) == {"master": 1, "momentum": -1}


def test_originals_that_are_not_registered_are_refused_with_nothing_written() -> None:
    model = three_layers().bfloat16()
    optimizer = MasterSGD(model.parameters(), lr=0.01)
    plan = analyze(model, INPUTS[:2].bfloat16())
    enorm = ENorm(plan, optimizer, start="as_is", backend="eager")
    half_step(model, optimizer)
    old = weights(model)
    with pytest.raises(OptimizerStateError, match="keeps the buffer 'master'"):
        enorm.step()
    assert same_bits(weights(model), old)


def gradients_of_copies_(model: nn.Module, master: nn.Module) -> None:
    """Give float32 originals the gradients of their bfloat16 copies."""
    model.zero_grad()
    model(INPUTS.bfloat16()).square().mean().backward()
    for p, own in zip(master.parameters(), model.parameters(), strict=True):
        p.grad = own.grad.float()  # type: ignore[union-attr]


def copied_(model: nn.Module, master: nn.Module) -> None:
    """The copies are those of the originals again."""
    with torch.no_grad():
        for p, own in zip(master.parameters(), model.parameters(), strict=True):
            own.copy_(p)


def test_originals_outside_of_the_model_are_analyzed_in_its_place() -> None:
    """An optimizer of float32 copies is refused for the model, and right for a copy of it."""
    model = three_layers().bfloat16()
    master = copy.deepcopy(model).float()
    optimizer = torch.optim.SGD(master.parameters(), lr=0.01, momentum=0.9)
    with pytest.raises(ArgumentError, match="copies of them in another precision"):
        ENorm(analyze(model, INPUTS[:2].bfloat16()), optimizer)
    enorm = ENorm(analyze(master, INPUTS[:2].float()), optimizer)
    for _ in range(3):
        gradients_of_copies_(model, master)
        optimizer.step()
        with torch.no_grad():
            before = master(INPUTS.float())
            enorm.step()
            assert torch.allclose(master(INPUTS.float()), before, rtol=1e-4, atol=1e-6)
        copied_(model, master)
    assert enorm.stats().largest_factor < math.exp(0.5)


def test_a_fused_step_refuses_an_optimizer_that_keeps_originals() -> None:
    """It would have to do that optimizer's arithmetic; unfused, the originals follow."""
    model = three_layers().bfloat16()
    optimizer = Known(model.parameters(), lr=0.01)
    plan = analyze(model, INPUTS[:2].bfloat16())
    with pytest.raises(
        ArgumentError, match=r"SGD, Adam, AdamW .*not that of Known: use fused=False"
    ):
        ENorm(plan, optimizer, fused=True)
    assert "step" not in vars(optimizer)
    ENorm(plan, optimizer, fused=False)


def trained_on_copies(
    kind: str, backend: str, fused: bool, rescaled: bool = True
) -> dict[str, Tensor]:
    """Float32 originals after four steps on gradients of their bfloat16 copies."""
    model = three_layers().bfloat16()
    with torch.no_grad():
        model[0].weight *= 16
    master = copy.deepcopy(model).float()
    optimizer = (
        torch.optim.SGD(master.parameters(), lr=0.01, momentum=0.9)
        if kind == "SGD"
        else torch.optim.AdamW(master.parameters(), lr=0.01, eps=1e-30)
    )
    plan = analyze(master, INPUTS[:2].float())
    # Powers of two: the copies of a rescaled network are the rescaled copies, to the last bit.
    enorm = ENorm(plan, optimizer, exact=True, backend=backend, fused=fused, start="as_is")
    if rescaled:
        enorm.attach()
    before = weights(master)
    for _ in range(4):
        gradients_of_copies_(model, master)
        optimizer.step()
        copied_(model, master)
    if fused:
        assert enorm.backend == backend
        enorm.flush_()
    assert not same_bits(weights(master), before)
    return weights(master)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_fused_step_of_originals_goes_the_way_of_an_unfused_one(kind: str, backend: str) -> None:
    unfused = trained_on_copies(kind, backend, fused=False)
    fused = trained_on_copies(kind, backend, fused=True)
    assert largest_error(fused, unfused) < 1e-5
    plain = trained_on_copies(kind, backend, fused=False, rescaled=False)
    assert largest_error(plain, unfused) > 0.5
