"""Averages of weights (EMA, SWA) are of one network only in canonical form."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from enorm_fx import analyze, canonicalize_
from tests.support.helpers import largest_error, random_scales, weights
from tests.support.training import network


def averaged(models: list[nn.Module], canonical: bool) -> dict[str, Tensor]:
    average = AveragedModel(copy.deepcopy(models[0]))
    for model in models:
        moment = copy.deepcopy(model)
        if canonical:
            canonicalize_(moment)
        average.update_parameters(moment)
    return weights(average.module)


def test_the_average_does_not_depend_on_how_each_network_is_scaled() -> None:
    models: list[nn.Module] = [network(seed).double() for seed in range(3)]
    rescaled = copy.deepcopy(models)
    for seed, model in enumerate(rescaled):
        plan = analyze(model)
        plan.rescale_(random_scales(plan, seed=seed))
    expected = averaged(models, canonical=True)
    assert largest_error(averaged(rescaled, canonical=True), expected) < 1e-8
    plain = averaged(models, canonical=False)
    assert largest_error(averaged(rescaled, canonical=False), plain) > 0.1


def test_in_canonical_form_the_network_is_the_same() -> None:
    model = network().double()
    moment = copy.deepcopy(model)
    canonicalize_(moment)
    inputs = torch.randn(4, 6, dtype=torch.float64)
    assert torch.allclose(moment(inputs), model(inputs), rtol=1e-10, atol=1e-12)
    assert largest_error(weights(moment), weights(model)) > 1e-2
