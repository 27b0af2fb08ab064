"""Whole networks, narrow: all their rescalings are found, and none besides."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from enorm_fx import analyze, count_symmetries, verify
from enorm_fx.model_plan import Plan
from tests.support.laws import ROUNDING
from tests.support.zoo_networks import NETWORKS, built

# The packed projection of cross attention is one parameter whose rows read two tensors: its
# columns have scales for each of them.
PACKED = "decoder layer, norm first"
# Read in parts, a packed projection has scales for its columns too, and one of them stands for
# rows together: another basis of the same scales.
BASES = {"decoder layer", PACKED}


@functools.cache
def plan_of(name: str, tracer: str = "auto") -> Plan:
    model, inputs = built(name)
    return analyze(model, inputs, batchnorm="affine", frozen="rescale", tracer=tracer)


@functools.cache
def symmetries(name: str) -> int:
    return count_symmetries(*built(name))


def groups_of(plan: Plan) -> Counter[Any]:
    return Counter(
        (group.channels, frozenset(group.producers), frozenset(group.consumers))
        for group in plan.groups
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_every_symmetry_is_found(name: str) -> None:
    assert plan_of(name).num_scales == symmetries(name) > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_random_rescalings_keep_the_outputs(name: str) -> None:
    plan = plan_of(name)
    assert plan.exact
    assert verify(plan, built(name)[1], trials=1).largest_change <= ROUNDING


@pytest.mark.parametrize("name", NETWORKS)
def test_both_front_ends_agree(name: str) -> None:
    symbolic, export = plan_of(name, "symbolic"), plan_of(name, "export")
    assert symbolic.num_scales == export.num_scales
    if name not in BASES:
        assert groups_of(symbolic) == groups_of(export)


def test_a_packed_projection_has_input_scales_for_each_of_its_inputs() -> None:
    (norm,) = [g for g in plan_of(PACKED).groups if g.producers == ("norm2.weight",)]
    assert norm.channels == 4


@pytest.mark.parametrize("name", ["resnet of basic blocks", "llama block", "unet"])
def test_a_plan_that_lacks_a_group_is_noticed(name: str) -> None:
    plan = plan_of(name)
    for missing in plan.groups:
        less = plan.select(lambda group, missing=missing: group != missing)
        assert less.num_scales == symmetries(name) - missing.channels < symmetries(name)


def test_a_plan_of_another_network_is_noticed() -> None:
    """Were ReLU6 taken for ReLU, the count and the outputs would both tell."""
    model, inputs = built("mobilenet with relu6")
    wrong = replace(plan_of("mobilenet with relu"), model=model)
    assert wrong.num_scales > symmetries("mobilenet with relu6")
    scaled = tuple(20 * x for x in inputs)  # far enough from zero that six is passed
    assert verify(wrong, scaled, trials=1).largest_change > 1e-3
