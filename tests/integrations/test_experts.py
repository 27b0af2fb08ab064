"""Mixtures of experts of transformers: one plan, however the experts are computed."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch

from enorm_fx import analyze
from enorm_fx.model_plan import Plan
from tests.support.language_models import build, inputs


def plan_of(implementation: str, tracer: str) -> Plan:
    model: Any = build("mixtral")
    model.set_experts_implementation(implementation)
    return analyze(model, inputs(), tracer=tracer)


def groups_of(plan: Plan) -> Counter[Any]:
    return Counter((g.channels, g.producers, g.consumers) for g in plan.groups)


@pytest.mark.parametrize(
    ("implementation", "tracer"),
    [("grouped_mm", "symbolic"), ("grouped_mm", "export"), ("batched_mm", "export")],
)
def test_the_plan_is_the_same(implementation: str, tracer: str) -> None:
    plan, expected = plan_of(implementation, tracer), plan_of("batched_mm", "symbolic")
    assert plan.num_scales == expected.num_scales
    assert groups_of(plan) == groups_of(expected)
    experts = [g for g in plan.groups if any("experts.gate_up" in name for name in g.producers)]
    assert experts
    assert all(any("down_proj" in name for name in g.consumers) for g in experts)


def test_rescaling_keeps_what_grouped_experts_compute() -> None:
    plan = plan_of("grouped_mm", "auto")
    with torch.no_grad():
        before = copy.deepcopy(plan.model)(**inputs()).logits
        generator = torch.Generator().manual_seed(0)
        plan.rescale_(0.3 * torch.randn(plan.num_scales, generator=generator))
        after = plan.model(**inputs()).logits
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
