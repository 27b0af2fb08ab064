"""Second moments that an optimizer keeps as means of rows and of columns: their product follows.

Of R (n, 1) and C (1, m) Adafactor makes the estimate R C / mean(R) of each entry's squared
gradient. Where a weight is multiplied by factors a of rows and columns, the estimate takes a^-2, to
the last digits. The means are then those of this estimate, and where the squared gradients are
themselves such a product, they are those that a rescaled network in training would have come to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from enorm_fx import ENorm, analyze, register_optimizer_state
from enorm_fx.errors import OptimizerStateError
from enorm_fx.step.factors import Write
from enorm_fx.step.following import state_writes
from enorm_fx.step.layout import CellTerm, Entry, Part
from enorm_fx.step.optimizer_state import FactoredMoments, exponents, state_buffers
from tests.support.helpers import buffers, largest_error, random_scales, same_bits, weights

IMAGES = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network() -> nn.Sequential:
    """A convolution, a matrix whose columns have factors in runs of 16, and some without runs."""
    torch.manual_seed(1)
    convolutions = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten()]
    layers = [nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)]
    return nn.Sequential(*convolutions, *layers).double()


class Squeezed(torch.optim.Optimizer):
    """Keeps means without the axes of size 1, as the Adafactor of transformers does."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state, squares = self.state[p], p.grad.square()
            if p.dim() < 2:
                state["full"] = squares
            else:
                state["by_row"], state["by_column"] = squares.mean(-1), squares.mean(-2)


register_optimizer_state(Squeezed, {"full": -2, "by_row * by_column": -2})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), torch.ones(len(inputs), 3, dtype=torch.float64)).backward()
        optimizer.step()


def estimates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer takes for the squared gradients."""
    found, known = {}, exponents(optimizer)
    for name, p in model.named_parameters():
        (buffer,) = state_buffers(optimizer, p, name, known)
        if isinstance(buffer, FactoredMoments):
            found[name] = buffer.rows @ buffer.columns / buffer.rows.mean(-2, keepdim=True)
        else:
            found[name] = buffer.tensor.clone()
    return found


def images(before: dict[str, Tensor], factors: dict[str, Tensor], power: int) -> dict[str, Tensor]:
    return {name: value * factors[name] ** power for name, value in before.items()}


@pytest.mark.parametrize("make", [torch.optim.Adafactor, Squeezed])
def test_the_estimate_takes_its_power_exactly(make: Any) -> None:
    model = network()
    plan, optimizer = analyze(model, IMAGES), make(model.parameters())
    train(model, optimizer, IMAGES, 3)
    old, before = weights(model), estimates(model, optimizer)
    plan.rescale_(random_scales(plan), optimizer)
    factors = {name: w / old[name] for name, w in weights(model).items()}
    after = estimates(model, optimizer)
    assert largest_error(after, images(before, factors, -2)) < 1e-12
    # The law tells another power, and an estimate that stays.
    assert largest_error(after, images(before, factors, -1)) > 1e-2
    assert largest_error(after, before) > 1e-2
    for name, p in model.named_parameters():
        for buffer in state_buffers(optimizer, p, name, exponents(optimizer)):
            if isinstance(buffer, FactoredMoments):
                means = buffer.rows.mean((-2, -1)), buffer.columns.mean((-2, -1))
                assert torch.allclose(*means, rtol=1e-12, atol=0)


def test_means_are_those_of_a_rescaled_training_where_they_lose_nothing() -> None:
    """The squared gradient of a linear layer for one example is a product of a row and a column."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6, False), nn.ReLU(), nn.Linear(6, 3, False)).double()
    example = torch.rand(1, 4, dtype=torch.float64)
    plan, still = analyze(model), {"lr": 0.0, "eps": (1e-60, 0.0)}
    optimizer = torch.optim.Adafactor(model.parameters(), **still)
    train(model, optimizer, example, 3)
    plan.rescale_(random_scales(plan), optimizer)
    other = torch.optim.Adafactor(model.parameters(), **still)
    train(model, other, example, 3)
    assert largest_error(buffers(optimizer), buffers(other)) < 1e-12


def test_a_step_of_enorm_takes_them_along_and_keeps_the_function() -> None:
    model = network()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.05)
    enorm = ENorm(analyze(model, IMAGES), optimizer, start="as_is")
    assert enorm.backend in ("native", "eager")
    for _ in range(3):
        train(model, optimizer, IMAGES, 1)
        old, before, outputs = weights(model), estimates(model, optimizer), model(IMAGES)
        enorm.step()
        factors = {name: w / old[name] for name, w in weights(model).items()}
        assert largest_error(old, weights(model)) > 1e-3
        assert largest_error(estimates(model, optimizer), images(before, factors, -2)) < 1e-12
        assert torch.allclose(model(IMAGES), outputs, rtol=1e-10)
    assert enorm.backend == "eager"
    assert "rows and of columns" in enorm.code


def test_moments_of_zero_stay_zero() -> None:
    model = network()
    plan, optimizer = analyze(model, IMAGES), torch.optim.Adafactor(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    plan.rescale_(random_scales(plan), optimizer)
    moments = {k: v for k, v in buffers(optimizer).items() if not k.endswith("step")}
    assert len(moments) == 4 * 2 + 4  # of four weights two each, of four biases one
    assert not any(value.any() for value in moments.values())


def test_factors_that_are_not_of_rows_and_columns_are_refused() -> None:
    """No rule makes such an entry today: each of a matrix's entries has a factor of its own."""
    weight = nn.Parameter(torch.rand(3, 4))
    optimizer = torch.optim.Adafactor([weight])
    weight.grad = torch.ones(3, 4)
    optimizer.step()

    def writes(*axes: tuple[int, ...]) -> list[Write]:
        parts = []
        for k in axes:
            shape = tuple(size if axis in k else 1 for axis, size in enumerate((3, 4)))
            parts.append(Part(k, shape, (CellTerm(1.0, torch.arange(math.prod(shape))),)))
        entry = Entry("w", (3, 4), (3, 4), (1, 1), True, 0, tuple(parts))
        return state_writes(0, entry, weight, optimizer, exponents(optimizer))

    assert len(writes((0,), (1,))) == 1
    with pytest.raises(OptimizerStateError, match="'w', are means of rows and of columns"):
        writes((0,), (0, 1))


@pytest.fixture
def alone() -> Iterator[DeviceMesh]:
    """A mesh of this process only."""
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    destroy_process_group()


def test_means_over_a_weight_in_parts_are_refused_with_nothing_written(alone: DeviceMesh) -> None:
    model = network()
    plan = analyze(model, IMAGES)
    fully_shard(model, mesh=alone)
    optimizer = Squeezed(model.parameters())
    train(model, optimizer, IMAGES, 1)
    old = {name: p.full_tensor().clone() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    with pytest.raises(OptimizerStateError, match=r"'by_row .* lies in parts on several processes"):
        plan.rescale_(random_scales(plan), optimizer)
    now = {name: p.full_tensor() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    assert same_bits(now, old)


@pytest.mark.parametrize("broken", ["one is missing", "another shape"])
def test_means_that_do_not_fit_are_refused(broken: str) -> None:
    model = network()
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer, IMAGES, 1)
    weight = model[3].weight
    state = optimizer.state[weight]
    state["col_var"] = None if broken == "one is missing" else torch.zeros(6, 48)
    message = "only one of 'row_var' and" if broken == "one is missing" else r"'col_var' of shape"
    with pytest.raises(OptimizerStateError, match=message):
        state_buffers(optimizer, weight, "3.weight", exponents(optimizer))
