"""Steps that a GradScaler skips, and steps that are given a closure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enorm_fx import ENorm, analyze
from tests.support.helpers import buffers, largest_error, same_bits, weights
from tests.support.training import data, network

FUSED = pytest.mark.parametrize("fused", [False, True])
CLASSES = pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])


def _loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(data()[0]), data()[1])


def _set_up(cls: Any, fused: bool) -> tuple[nn.Module, torch.optim.Optimizer, ENorm]:
    model = network()
    optimizer = cls(model.parameters(), lr=0.01, fused=fused)
    return model, optimizer, ENorm(analyze(model), optimizer, backend="eager").attach()


@FUSED
@CLASSES
def test_a_skipped_step_skips_everything(cls: Any, fused: bool) -> None:
    model, optimizer, enorm = _set_up(cls, fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    state = enorm.state_dict()
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(_loss(model)).backward()
        overflows = step in (0, 1, 4)  # at the very beginning too, where training would start
        if overflows:
            next(model.parameters()).grad[0, 0] = torch.inf  # type: ignore[index]
        old, old_buffers, old_state = weights(model), buffers(optimizer), enorm.state_dict()
        scaler.step(optimizer)
        scaler.update()
        assert same_bits(weights(model), old) is overflows
        if overflows:
            now = buffers(optimizer)  # a fused step makes buffers of zeros
            assert same_bits({k: now[k] for k in old_buffers}, old_buffers)
            assert enorm.state_dict() == old_state
    assert enorm.state_dict() == {**state, "calls": 3, "started": True}


@FUSED
@CLASSES
def test_scaled_gradients_give_the_weights_of_plain_ones(cls: Any, fused: bool) -> None:
    """Powers of two change nothing: the start rescales scaled gradients as it does plain ones."""
    ends = []
    for scaler in (
        torch.amp.GradScaler("cpu", enabled=e, init_scale=1024.0) for e in (True, False)
    ):
        model, optimizer, _enorm = _set_up(cls, fused)
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(_loss(model)).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append(weights(model))
    assert largest_error(*ends) < 1e-5


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_changes_no_bit(keyword: bool) -> None:
    """The start comes between the gradients and the update, wherever gradients are computed."""
    ends = []
    for given in (False, True):
        model, optimizer, _enorm = _set_up(torch.optim.SGD, fused=False)

        def closure(model: nn.Module = model) -> Tensor:
            model.zero_grad()
            loss = _loss(model)
            loss.backward()
            return loss.detach()

        for _ in range(3):
            if not given:
                closure()
                optimizer.step()
            elif keyword:
                assert float(optimizer.step(closure=closure)) > 0  # type: ignore[arg-type]
            else:
                assert float(optimizer.step(closure)) > 0  # type: ignore[arg-type]
        ends.append(weights(model))
    assert same_bits(*ends)
    assert not same_bits(ends[0], weights(network()))
