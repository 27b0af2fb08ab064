"""Weights that torch's hooks compute before every call: inside the model, and counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from enorm_fx import analyze, count_symmetries, verify
from enorm_fx.errors import TraceError
from tests.support.laws import ROUNDING

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # the hook is deprecated
INPUT = torch.ones(6, 3)


def network(normed: Callable[..., nn.Module], **options: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            normed(nn.Linear(3, 4), **options), nn.ReLU(),
            normed(nn.Linear(4, 5), **options), nn.ReLU(), nn.Linear(5, 2),
        )  # fmt: skip
    return model.eval()


@pytest.mark.parametrize(
    ("hook", "modern", "options"),
    [
        (weight_norm, parametrizations.weight_norm, {}),
        (weight_norm, parametrizations.weight_norm, {"dim": 1}),
        (weight_norm, parametrizations.weight_norm, {"dim": None}),
        (spectral_norm, parametrizations.spectral_norm, {}),
    ],
)
def test_both_forms_have_the_scales_that_a_count_by_numbers_finds(
    hook: Callable[..., nn.Module], modern: Callable[..., nn.Module], options: dict[str, object]
) -> None:
    old, new = network(hook, **options), network(modern, **options)
    plans = [analyze(m, INPUT, tracer="symbolic") for m in (old, new)]
    plans.append(analyze(new, INPUT, tracer="export"))
    assert {plan.num_scales for plan in plans} == {count_symmetries(new, INPUT)}
    assert count_symmetries(old, INPUT) == count_symmetries(new, INPUT) > 0
    for plan in plans:
        assert verify(plan, trials=1).largest_change <= ROUNDING


def test_the_hook_weights_stay_as_they_were() -> None:
    model = network(weight_norm)
    before = {name: getattr(model[0], name) for name in ("weight", "weight_g", "weight_v")}
    verify(analyze(model, INPUT))
    assert all(getattr(model[0], name) is value for name, value in before.items())


class ReadsTheLastWeight(nn.Module):
    """What the layer's weight was in the call before is read, before this call makes it anew."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        last = F.linear(x, self.a.weight)
        return self.b(self.a(x).relu() + last.relu())


def test_a_weight_of_the_call_before_is_noticed() -> None:
    with pytest.raises(TraceError, match="does not do the same in every call"):
        analyze(ReadsTheLastWeight(), INPUT)


def test_what_ties_the_slices_of_a_normed_weight_is_named() -> None:
    sides = {(b.weight, b.side): b for b in analyze(network(weight_norm), INPUT).blocked}
    blocked = sides["2.weight_v", "input"]
    assert blocked.reason == "'weight_norm' asks that its slices on this side scale alike"
    assert blocked.node == "2.weight_norm"
    assert ("2.weight_g", "input") not in sides
    training = network(spectral_norm).train()
    sides = {(b.weight, b.side): b for b in analyze(training, INPUT).blocked}
    assert sides["2.weight_orig", "input"].node == "2.normalize"
