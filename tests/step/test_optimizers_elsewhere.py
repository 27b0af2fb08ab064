"""Optimizers of other packages follow as docs/optimizers.md registers them: its lines are run here.

A package that is not installed is passed over; the `dev` extra has those that are small.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enorm_fx import ENorm, analyze
from enorm_fx.errors import OptimizerStateError
from enorm_fx.step.optimizer_state import (
    FactoredMoments,
    exponents,
    register_optimizer_state,
    state_buffers,
)
from tests.support.helpers import largest_error, random_scales, same_bits, weights
from tests.support.three_layers import step, three_layers

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"
LINES = {
    found[1]: block
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    if (found := re.search(r"^from (\w+)", block, flags=re.MULTILINE))
}
TINY = 1e-60  # the one constant that does not scale, far below every gradient

# By class: its package, how it is made, the power that its next update takes; None: none.
CASES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "Lion": ("lion_pytorch", {"lr": 0.01}, 0),
    "SGDScheduleFree": ("schedulefree", {"lr": 0.1}, None),
    "AdamWScheduleFree": ("schedulefree", {"lr": 0.01, "eps": TINY}, None),
    "RAdamScheduleFree": (
        "schedulefree", {"lr": 0.01, "eps": TINY, "silent_sgd_phase": False}, None
    ),
    "Adan": ("pytorch_optimizer", {"lr": 0.01, "eps": TINY}, 0),
    "Lamb": ("pytorch_optimizer", {"lr": 0.01, "eps": TINY}, None),
    "CAME": ("pytorch_optimizer", {"lr": 0.01}, None),
    "Adafactor": ("transformers", {}, None),
}  # fmt: skip


def classes_of(package: str) -> dict[str, Any]:
    """The classes that the page's lines register, by name, after they have been run."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what packages say while they are imported
        exec(LINES[package], names)
    return names


def after_three_steps(make: Callable[[Any], torch.optim.Optimizer]) -> tuple[Any, Any]:
    model = three_layers()
    optimizer = make(model.parameters())
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[tuple[str, str], Tensor]:
    """Buffers, and of means of rows and columns the estimate that is made of them."""
    found = {}
    for name, p in model.named_parameters():
        for buffer in state_buffers(optimizer, p, name, exponents(optimizer)):
            if isinstance(buffer, FactoredMoments):
                value = buffer.rows @ buffer.columns / buffer.rows.mean(-2, keepdim=True)
            else:
                value = buffer.tensor.clone()
            found[name, buffer.name] = value
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_the_lines_of_the_page_make_buffers_follow(name: str) -> None:
    package, settings, power = CASES[name]
    cls = classes_of(package)[name]
    (model, optimizer), (rescaled, other) = (
        after_three_steps(lambda w: cls(w, **settings)) for _ in range(2)
    )
    plan = analyze(rescaled)
    old, before = weights(rescaled), states(rescaled, other)
    plan.rescale_(random_scales(plan), other)
    factors = {n: w / old[n] for n, w in weights(rescaled).items()}
    known = exponents(other)
    registered = {key for key, exponent in known.items() if exponent}
    assert {key for _, key in before} >= registered - {"exp_avg_sq"}
    for (weight, key), value in states(rescaled, other).items():
        expected = before[weight, key] * factors[weight] ** known[key]
        assert torch.allclose(value, expected, rtol=1e-12, atol=0), key
        wrong = before[weight, key] * factors[weight] ** (known[key] + 1)
        assert not torch.allclose(value, wrong, rtol=1e-2, atol=0), key

    start = weights(rescaled)
    for each in ((model, optimizer), (rescaled, other)):
        step(*each)
    updates = {n: w - old[n] for n, w in weights(model).items()}
    images = {n: w - start[n] for n, w in weights(rescaled).items()}
    for tried in (-1, 0, 1):
        expected = {n: u * factors[n] ** tried for n, u in updates.items()}
        assert (largest_error(images, expected) < 1e-8) is (tried == power)


@pytest.mark.filterwarnings("ignore")
def test_the_average_of_schedule_free_training_is_the_same_network() -> None:
    """What it evaluates is made of the weights and of z, which have the same factors."""
    cls = classes_of("schedulefree")["AdamWScheduleFree"]
    model = three_layers()
    optimizer = cls(model.parameters(), lr=0.01)
    optimizer.train()
    enorm = ENorm(analyze(model), optimizer, start="as_is")
    inputs = torch.rand(8, 4, dtype=torch.float64)
    for _ in range(3):
        step(model, optimizer)
        outputs = []
        for before in (True, False):
            optimizer.eval()
            outputs.append(model(inputs))
            optimizer.train()
            if before:
                old = weights(model)
                enorm.step()
        assert largest_error(weights(model), old) > 1e-3
        assert torch.allclose(*outputs, rtol=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_states_of_32_bits_follow_and_of_8_bits_are_refused() -> None:
    adam = classes_of("bitsandbytes")["Adam"]
    from bitsandbytes.optim import Adam8bit

    for cls, refused in ((adam, False), (Adam8bit, True)):
        if refused:
            register_optimizer_state(cls, {"state1": -1, "state2": -2})
        model = nn.Sequential(nn.Linear(64, 96, False), nn.ReLU(), nn.Linear(96, 64, False))
        optimizer = cls(model.parameters())
        model(torch.rand(4, 64)).square().sum().backward()
        optimizer.step()
        old, before = weights(model), copied(optimizer)
        plan = analyze(model)
        scales = random_scales(plan).round() * torch.log(torch.tensor(2.0, dtype=torch.float64))
        if refused:
            with pytest.raises(OptimizerStateError, match=r"'state1' of '0\.weight' quantized"):
                plan.rescale_(scales, optimizer)
            assert same_bits(weights(model), old)
            continue
        plan.rescale_(scales, optimizer)
        for key, value in copied(optimizer).items():
            number, name = key.split(".")
            factor = list(model.parameters())[int(number)] / list(old.values())[int(number)]
            assert torch.equal(value, before[key] * factor ** {"state1": -1, "state2": -2}[name])


@pytest.mark.filterwarnings("ignore")
def test_wrapped_8_bit_states_are_refused() -> None:
    pytest.importorskip("torchao")
    from torchao.optim import AdamW8bit

    model = nn.Sequential(nn.Linear(64, 96, False), nn.ReLU(), nn.Linear(96, 64, False))
    optimizer = AdamW8bit(model.parameters())
    model(torch.rand(4, 64)).square().sum().backward()
    optimizer.step()
    with pytest.raises(OptimizerStateError, match=r"'exp_avg' of .* quantized .OptimState8bit"):
        analyze(model).rescale_(torch.ones(96, dtype=torch.float64), optimizer)


def copied(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{number}.{key}": value.clone()
        for number, state in enumerate(optimizer.state.values())
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


class Codes(torch.optim.SGD):
    """Keeps a state of another type."""


register_optimizer_state(Codes, {"codes": -1})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["codes", "unknown"])
def test_codes_are_refused_with_the_reason_and_nothing_written(
    dtype: torch.dtype, name: str
) -> None:
    model = three_layers()
    plan, optimizer = analyze(model), Codes(model.parameters(), lr=0.1)
    weight = list(model.parameters())[1]
    optimizer.state[weight][name] = torch.ones(weight.shape).to(dtype)
    old = weights(model)
    with pytest.raises(OptimizerStateError, match=f"'{name}' of '2.weight' quantized .{dtype}"):
        plan.rescale_(random_scales(plan), optimizer)
    assert same_bits(weights(model), old)


def test_every_case_is_on_the_page() -> None:
    assert {package for package, *_ in CASES.values()} | {"bitsandbytes"} == set(LINES)
    rows = re.findall(r"^\| (`\w+`.*?) \| (none|-?\d) \| [^|]*\|$", PAGE.read_text(), re.MULTILINE)
    told = {name: update for names, update in rows for name in re.findall(r"`(\w+)`", names)}
    for name, (_, _, power) in CASES.items():
        assert told[name] == ("none" if power is None else str(power))
