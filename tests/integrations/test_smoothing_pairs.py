"""Pairs of modules for SmoothQuant and AWQ, and those that llm-compressor ships, held by numbers.

What llm-compressor's own mappings name in the same models is recorded (`record_mappings.py`).
"""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from enorm_fx import analyze
from enorm_fx.errors import ArgumentError
from enorm_fx.model_plan import Plan
from tests.support.language_models import NAMES, build, change_by, inputs, with_plain_norms
from tests.support.zoo_kit import Net

METHODS = ("smoothquant", "awq")
FILE = Path(__file__).parents[1] / "data" / "llmcompressor_mappings.json"
RECORDED = json.loads(FILE.read_text(encoding="utf-8"))["mappings"]

# Smooth layers of shipped pairs that we do not have, for one of two reasons.
BREAKS = "the model computes something else after it"
SHIPPED_ALONE = {
    # fc1 reads the norm too.
    ("phi", "smoothquant", "input_layernorm"): BREAKS,
    # What this norm gives is added to the residual stream; another feeds the MLP.
    ("gemma2", "smoothquant", "post_attention_layernorm"): BREAKS,
    ("gemma3", "smoothquant", "post_attention_layernorm"): BREAKS,
}
# Smooth layers of pairs that we have and that are not shipped, beside the last norm, which feeds
# the head where it is not tied.
OURS_ALONE = {
    ("mixtral", "awq", "input_layernorm"): "no pattern fits packed experts",
    ("mixtral", "awq", "v_proj"): "no pattern fits packed experts",
    ("phi", "smoothquant", "input_layernorm"): "fc1 belongs to it",
    ("phi", "awq", "input_layernorm"): "no pattern fits the names",
    ("phi", "awq", "v_proj"): "no pattern fits the names",
    ("opt", "smoothquant", "self_attn_layer_norm"): "no pattern fits the names",
    ("opt", "smoothquant", "final_layer_norm"): "no pattern fits the names",
    ("opt", "awq", "self_attn_layer_norm"): "no pattern fits the names",
    ("opt", "awq", "v_proj"): "no pattern fits the names",
    ("opt", "awq", "final_layer_norm"): "no pattern fits the names",
    ("opt", "awq", "fc1"): "no pattern fits the names",
    ("gemma2", "smoothquant", "pre_feedforward_layernorm"): "it is what feeds the MLP",
    ("gemma3", "smoothquant", "pre_feedforward_layernorm"): "it is what feeds the MLP",
    # Left out there because queries and keys are normalized, which makes it quantize no better.
    ("gemma3", "awq", "input_layernorm"): "it keeps the function all the same",
}


@functools.cache
def model_of(name: str) -> nn.Module:
    return with_plain_norms(build(name))


@functools.cache
def plan_of(name: str) -> Plan:
    return analyze(model_of(name), inputs(), batchnorm="affine")


def alone(
    some: dict[str, list[str]], others: dict[str, list[str]]
) -> dict[str, tuple[str, list[str]]]:
    """Last part of a smooth layer's name -> one pair of `some` that is not among the others."""
    return {
        smooth.rpartition(".")[2]: (smooth, balance)
        for smooth, balance in some.items()
        if sorted(others.get(smooth, ())) != sorted(balance)
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_pair_keeps_the_function(name: str) -> None:
    pairs, direct = (plan_of(name).smoothing_pairs(method) for method in ("awq", "smoothquant"))
    assert len({pair.smooth_layer for pair in pairs}) == len(pairs) > len(direct) >= 2
    assert all(pair in pairs for pair in direct)
    for pair in pairs:
        assert change_by(model_of(name), *pair) < 1e-9


@pytest.mark.parametrize(("name", "method"), [*itertools.product(NAMES, METHODS)])
def test_nothing_that_is_shipped_is_missing_without_a_reason(name: str, method: str) -> None:
    ours = dict(plan_of(name).smoothing_pairs(method))
    shipped = dict(RECORDED[name][method] or [])
    missing, more = alone(shipped, ours), alone(ours, shipped)
    assert {(name, method, last) for last in missing} == {
        key for key in SHIPPED_ALONE if key[:2] == (name, method)
    }
    for smooth, balance in missing.values():
        assert change_by(model_of(name), smooth, balance) > 1e-3
    heads = {"norm", "final_layernorm"} if any(b == ["lm_head"] for b in ours.values()) else set()
    assert {(name, method, last) for last in more if last not in heads} == {
        key for key in OURS_ALONE if key[:2] == (name, method)
    }


@pytest.mark.parametrize(
    ("smooth", "balance"),
    [
        ("model.layers.0.input_layernorm", ["q_proj", "k_proj"]),
        ("model.layers.0.post_attention_layernorm", ["q_proj", "k_proj", "v_proj"]),
        ("model.layers.1.input_layernorm", ["q_proj", "k_proj", "v_proj"]),
    ],
)
def test_a_wrong_pair_is_rejected(smooth: str, balance: list[str]) -> None:
    layers = [f"model.layers.0.self_attn.{name}" for name in balance]
    assert change_by(model_of("llama"), smooth, layers) > 1e-3


def test_grouped_queries_are_more_than_a_pair() -> None:
    plan = analyze(model_of("llama, grouped queries"), inputs())
    group = next(g for g in plan.groups if g.producers[0].endswith("v_proj.weight"))
    assert group.channels == 16
    assert not any(p.smooth_layer.endswith("v_proj") for p in plan.smoothing_pairs())


L, C = nn.Linear, nn.Conv2d


@pytest.mark.parametrize(
    ("model", "inputs", "smoothquant", "awq"),
    [
        (Net(lambda m, x: m.b(m.a(x).relu()), a=L(3, 4), b=L(4, 2)), (2, 3), 0, 1),
        (Net(lambda m, x: m.b(m.n(x)), n=nn.LayerNorm(3), b=L(3, 2)), (2, 3), 1, 1),
        # Not in order, two producers, a scale for several columns, no modules, another layer.
        (Net(lambda m, x: m.b(m.n(x).flip(-1)), n=nn.LayerNorm(3), b=L(3, 2)), (2, 3), 0, 0),
        (Net(lambda m, x: m.c((m.a(x) + m.b(x)).relu()), a=L(3, 4), b=L(3, 4), c=L(4, 2)), (2, 3),
         0, 0),
        (Net(lambda m, x: m.b(m.a(x).relu().repeat(1, 2)), a=L(3, 4), b=L(8, 2)), (2, 3), 0, 0),
        (Net(lambda m, x: m.n(x) @ m.w, n=nn.LayerNorm(3), w=nn.Parameter(torch.randn(3, 2))),
         (2, 3), 0, 0),
        (Net(lambda m, x: m.b(m.a(x).relu()), a=C(3, 4, 1), b=C(4, 2, 1)), (2, 3, 4, 4), 0, 0),
        # The last half of a packed projection, with a bias and without one; the first half.
        (Net(lambda m, x: m.b(m.a(x).relu().chunk(2, -1)[1]), a=L(3, 8, False), b=L(4, 2)), (2, 3),
         0, 1),
        (Net(lambda m, x: m.b(m.a(x).relu().chunk(2, -1)[1]), a=L(3, 8), b=L(4, 2)), (2, 3), 0, 0),
        (Net(lambda m, x: m.b(m.a(x).relu().chunk(2, -1)[0]), a=L(3, 8, False), b=L(4, 2)), (2, 3),
         0, 0),
        # Squares of scales.
        (Net(lambda m, x: m.b(m.a(x).relu().square()), a=L(3, 4), b=L(4, 2)), (2, 3), 0, 0),
    ],
)  # fmt: skip
def test_only_what_a_pair_says_is_told_as_one(
    model: nn.Module, inputs: tuple[int, ...], smoothquant: int, awq: int
) -> None:
    plan = analyze(model, torch.randn(inputs))
    assert len(plan.smoothing_pairs("smoothquant")) == smoothquant
    assert len(plan.smoothing_pairs("awq")) == len(plan.smoothing_pairs()) == awq


def test_what_is_refused() -> None:
    model = nn.Sequential(L(3, 4), nn.BatchNorm1d(4), nn.ReLU(), L(4, 2)).eval()
    with pytest.raises(ArgumentError, match="does not keep the function"):
        analyze(model, torch.randn(2, 3)).smoothing_pairs()
    with pytest.raises(ArgumentError, match="method must be one of"):
        analyze(model, torch.randn(2, 3), batchnorm="affine").smoothing_pairs("gptq")
