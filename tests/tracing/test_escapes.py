"""Ways out of a model, and round the tracer, that a hunt has found: each pins, or is refused."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import enorm_fx
from enorm_fx.errors import TraceError
from tests.support.tracing_kit import ROWS, L, sound, two_layers


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "slots": Slotted,
    "closure": lambda y: lambda: y,
    "default": lambda y: lambda z=y: z,
    "generator": lambda y: (t for t in [y]),
    "partial": lambda y: functools.partial(torch.add, y),
    "bound method": lambda y: Slotted(y).__init__,  # type: ignore[misc]
    "values": lambda y: {"y": y}.values(),
    "iterator": lambda y: iter([y]),
    "zip": lambda y: zip([y], [1], strict=True),
    "map": lambda y: map(torch.abs, [y]),
    "distribution": lambda y: torch.distributions.Normal(y, 1.0, validate_args=False),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_tensor_leaves_the_model_in_whatever_holds_it(holder: str) -> None:
    hold = HOLDERS[holder]

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x).relu()
        return m.b(y), hold(y)

    assert enorm_fx.analyze(two_layers(run), ROWS).num_scales == 0


def assign(y: Tensor, z: Tensor) -> None:
    y.data = z


def exchange(y: Tensor, z: Tensor) -> None:
    torch.utils.swap_tensors(y, z)


@pytest.mark.parametrize("write", [assign, exchange, Tensor.set_, Tensor.copy_])
def test_a_tensor_that_becomes_another_is_seen(write: Callable[[Tensor, Tensor], Any]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        write(y, y.tanh())
        return m.b(y)

    try:
        found = enorm_fx.analyze(two_layers(run), ROWS, tracer="symbolic").num_scales
    except TraceError as error:
        assert "exchanged" in str(error) or "reads into Python" in str(error)  # noqa: PT017
        found = 0
    assert found == 0


@pytest.mark.parametrize(
    "read", [lambda y: y.sum().item(), lambda y: y.numpy(), lambda y: y.tolist(), float]
)
def test_a_model_that_catches_our_error_is_refused_all_the_same(read: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        try:
            read(y.sum() if read is float else y)
        except Exception:
            return m.b(y)
        return m.b(y.tanh())

    with pytest.raises(TraceError, match="reads into Python"):
        enorm_fx.analyze(two_layers(run), ROWS, tracer="symbolic")


def test_an_error_that_the_model_catches_is_met_again() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        try:
            return m.b(y.view(7, 7))
        except RuntimeError:
            return m.b(y)

    assert sound(two_layers(run)) == 4


def test_what_is_attached_to_a_tensor_is_attached_anew() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        if hasattr(y, "seen"):
            return m.b(y.tanh())
        y.seen = True  # type: ignore[attr-defined]
        return m.b(y)

    assert sound(two_layers(run)) == 4


class Layers(nn.Module):
    """It asks torch's own layers for their mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop, self.norm = L(3, 4), L(4, 2), nn.Dropout(), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        y = self.drop(y).relu()
        return self.b(y.tanh() if self.drop.training else y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_torchs_own_layers_is_asked_for(training: bool) -> None:
    model = Layers().double().train(training)
    assert enorm_fx.analyze(model, ROWS, batchnorm="affine").num_scales == 0


def test_a_generator_of_random_numbers_of_the_models_own_is_refused() -> None:
    numbers = random.Random(0)

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return m.b(y if int(numbers.random() * 64) % 2 else y.tanh())

    def several() -> None:
        for _ in range(4):  # two draws may be alike by chance, these are not all
            enorm_fx.analyze(two_layers(run), ROWS)

    with pytest.raises(TraceError, match="does not do the same in every call"):
        several()


@pytest.mark.parametrize("ask", [Tensor.is_inference, torch.is_inference])
def test_whether_a_tensor_was_made_in_inference_mode(ask: Callable[[Tensor], bool]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return m.b(y.tanh() if ask(y) else y)

    assert enorm_fx.analyze(two_layers(run), ROWS).num_scales == 0
