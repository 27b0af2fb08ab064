"""What `smooth` leaves alone, `balance` settles: then all rescalings are smoothed alike."""

from __future__ import annotations

import copy

import torch

from enorm_fx import analyze, balance, smooth
from tests.support.helpers import largest_error, random_scales, weights
from tests.support.laws import randomized
from tests.support.zoo_networks import Llama


def test_rescaled_networks_are_smoothed_alike_once_they_are_balanced() -> None:
    batches = [torch.arange(24).reshape(6, 4) % 5]
    one = randomized(Llama(16, 4, 2)).requires_grad_(False)
    other = copy.deepcopy(one)
    plan = analyze(other, batches[0], frozen="rescale")
    plan.rescale_(random_scales(plan))
    apart = {}
    for balanced in (False, True):
        found = []
        for model in (copy.deepcopy(one), copy.deepcopy(other)):
            if balanced:
                balance(analyze(model, batches[0], frozen="rescale"))
            report = smooth(model, batches)
            assert any("between weights alone" in why for _, why in report.left_out)
            found.append(weights(model))
        apart[balanced] = largest_error(*found)
    assert apart[True] < 1e-9
    assert apart[False] > 0.1
