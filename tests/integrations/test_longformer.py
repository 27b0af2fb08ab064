"""Longformer, whose windows overlap in memory: its queries and keys trade scale."""

from __future__ import annotations

import copy

import torch

from enorm_fx import analyze
from tests.support.language_models import hf


def test_queries_and_keys_have_their_scales() -> None:
    config = hf.LongformerConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, attention_window=[4], max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LongformerModel(config).eval()
    inputs = {"input_ids": torch.arange(16).reshape(2, 8) + 3}
    plan = analyze(model, inputs)
    assert [(g.channels, g.producers, g.consumers) for g in plan.groups] == [
        (16, ("encoder.layer.0.attention.self.query.weight",),
         ("encoder.layer.0.attention.self.key.weight",)),
    ]  # fmt: skip
    with torch.no_grad():
        before = copy.deepcopy(model)(**inputs).last_hidden_state
        plan.rescale_(torch.linspace(-1, 1, plan.num_scales))
        after = model(**inputs).last_hidden_state
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
