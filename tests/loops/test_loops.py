"""Whatever a training loop does beside stepping, ENorm keeps the function and the bits of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from enorm_fx import ENorm, analyze
from tests.support.helpers import buffers, largest_error, same_bits, weights
from tests.support.training import data, network

X, Y = data()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def attached(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> ENorm:
    return ENorm(analyze(model), optimizer, backend="eager", **settings).attach()


def backward(model: nn.Module, inputs: Tensor = X, labels: Tensor = Y) -> None:
    F.cross_entropy(model(inputs).float(), labels).backward()


# ---- compiled ----


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["wrapped", "in place", "analyzed when wrapped"])
def test_a_compiled_model_is_compiled_once(how: str) -> None:
    torch._dynamo.reset()
    counter, model = CompileCounter(), network()
    called: Any = model
    if how == "in place":
        model.compile(backend=counter)
    else:
        called = torch.compile(model, backend=counter)
    optimizer = adam(model)
    enorm = attached(called if how == "analyzed when wrapped" else model, optimizer)
    reference = network()
    other = adam(reference)
    _kept = attached(reference, other)
    for _ in range(4):
        for parts in ((called, optimizer), (reference, other)):
            parts[1].zero_grad()
            backward(parts[0])
            parts[1].step()
    assert counter.frame_count == 1
    assert enorm.state_dict()["calls"] == 4
    assert largest_error(weights(model), weights(reference)) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_optimizer_step_is_followed_too() -> None:
    torch._dynamo.reset()
    ends = []
    for compiled in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, foreach=True)
        enorm = attached(model, optimizer)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            step()
        assert enorm.state_dict()["calls"] == 3
        ends.append(weights(model))
    assert largest_error(*ends) < 1e-4


# ---- around the step ----


class Checkpointed(nn.Module):
    """The network, whose first layers are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.network[:2], x, use_reentrant=False)
        return self.network[2:](hidden)  # type: ignore[no-any-return]


def test_activation_checkpointing_changes_no_bit() -> None:
    model, reference = Checkpointed(), network()
    assert analyze(model).num_scales == analyze(reference).num_scales
    for each in (model, reference):
        optimizer = adam(each)
        _kept = attached(each, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            backward(each)
            optimizer.step()
    assert same_bits(weights(model.network), weights(reference))


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    ends = []
    for parts in (1, 4):
        model = network().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        enorm = attached(model, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            for x, y in zip(X.double().chunk(parts), Y.chunk(parts), strict=True):
                (F.cross_entropy(model(x), y) / parts).backward()
            optimizer.step()
        assert enorm.state_dict()["calls"] == 3
        ends.append(weights(model))
    assert largest_error(*ends) < 1e-9


def test_two_losses_clipping_and_a_schedule_are_the_optimizers_business() -> None:
    """One step follows, after all of them, and keeps the function."""
    model = network().double()
    plan = analyze(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    enorm = ENorm(plan, optimizer, backend="eager").attach()
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, X.double())
        model(X.double()[:4]).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        with torch.no_grad():
            before = model(X.double())
            enorm.step()
            assert torch.allclose(model(X.double()), before, rtol=1e-10, atol=1e-12)
        schedule.step()
    assert schedule.get_last_lr() == [0.05 / 8]


@pytest.mark.parametrize("exact", [False, True])
def test_autocast_and_weights_in_bfloat16_alone(exact: bool) -> None:
    model = network().to(torch.bfloat16) if exact else network()
    inputs = X.to(torch.bfloat16) if exact else X
    optimizer = adam(model)
    enorm = ENorm(analyze(model, inputs[:2]), optimizer, backend="eager", exact=exact)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            backward(model, inputs)
        optimizer.step()
        with torch.no_grad():
            before = model(inputs)
            enorm.step()
            after = model(inputs)
        assert torch.equal(after, before) if exact else torch.allclose(after, before, rtol=1e-4)
    assert enorm.state_dict()["started"]


# ---- resumed ----

Saved = tuple[nn.Module, torch.optim.Optimizer, ENorm]


def _with_torch(parts: Saved, folder: Path) -> Callable[[Saved], None]:
    torch.save([part.state_dict() for part in parts], folder / "run.pt")

    def load(fresh: Saved) -> None:
        for part, state in zip(fresh, torch.load(folder / "run.pt"), strict=True):
            part.load_state_dict(state)

    return load


def _with_safetensors(parts: Saved, folder: Path) -> Callable[[Saved], None]:
    save_file(parts[0].state_dict(), folder / "weights.safetensors")
    torch.save([part.state_dict() for part in parts[1:]], folder / "rest.pt")

    def load(fresh: Saved) -> None:
        fresh[0].load_state_dict(load_file(folder / "weights.safetensors"))
        for part, state in zip(fresh[1:], torch.load(folder / "rest.pt"), strict=True):
            part.load_state_dict(state)

    return load


def _with_dcp(parts: Saved, folder: Path) -> Callable[[Saved], None]:
    names = ("model", "optimizer", "enorm")
    dcp.save(dict(zip(names, (p.state_dict() for p in parts), strict=True)), checkpoint_id=folder)

    def load(fresh: Saved) -> None:
        # It loads into what is there: the buffers that the first step makes.
        for group in fresh[1].param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        kept = copy.deepcopy(fresh[2].state_dict())
        fresh[2].load_state_dict({**kept, "started": True})  # that step is no beginning
        enorm = fresh[2]
        enorm.detach()
        fresh[1].step()
        enorm.attach()
        state = dict(zip(names, (p.state_dict() for p in fresh), strict=True))
        dcp.load(state, checkpoint_id=folder)
        for part, name in zip(fresh, names, strict=True):
            part.load_state_dict(state[name])

    return load


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("save", [_with_torch, _with_safetensors, _with_dcp])
def test_a_resumed_run_goes_on_bit_for_bit(save: Any, tmp_path: Path) -> None:
    def fresh() -> Saved:
        model = network()
        optimizer = adam(model)
        return model, optimizer, attached(model, optimizer, every=2, c=1.1)

    def train(parts: Saved, steps: range) -> None:
        for step in steps:
            parts[1].zero_grad()
            backward(parts[0], X[step::4], Y[step::4])
            parts[1].step()

    whole, half = fresh(), fresh()
    train(whole, range(4))
    train(half, range(1))
    load = save(half, tmp_path)
    resumed = fresh()
    load(resumed)
    assert same_bits(weights(resumed[0]), weights(half[0]))
    train(resumed, range(1, 4))
    assert same_bits(weights(resumed[0]), weights(whole[0]))
    assert same_bits(buffers(resumed[1]), buffers(whole[1]))
    assert resumed[2].state_dict() == whole[2].state_dict()
