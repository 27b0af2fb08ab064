"""The mappings that we give llm-compressor, held against its own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("llmcompressor", reason="llmcompressor is not installed: its mappings untried")

from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    disable_quantization,
)
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache

from enorm_fx.errors import ArgumentError
from enorm_fx.integrations.llmcompressor import awq_mappings, smoothquant_mappings
from tests.integrations.record_mappings import awq_pairs, recorded, smoothquant_pairs
from tests.support.helpers import same_bits, weights
from tests.support.language_models import NAMES, build, change_by, hf, tokens

# Its own dependencies warn; that is not ours to judge.
pytestmark = pytest.mark.filterwarnings("ignore")


def prepared(name: str) -> nn.Module:
    return linearize_moe(build(name)) if name == "mixtral" else build(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_modifiers_find_the_modules_that_are_meant(name: str) -> None:
    model = prepared(name)
    old, modules = weights(model), dict(model.named_modules())
    modes = [m.training for m in model.modules()]
    awq, smoothquant = awq_mappings(model), smoothquant_mappings(model)
    assert same_bits(weights(model), old)
    assert dict(model.named_modules()) == modules
    assert [m.training for m in model.modules()] == modes
    found = awq_pairs(model, awq)
    assert found == [(m.smooth_layer, m.balance_layers) for m in awq]
    assert smoothquant_pairs(model, smoothquant) == [(s, b) for b, s in smoothquant]
    shipped = recorded(name, prepared)
    for method, ours in (("awq", found), ("smoothquant", [(s, b) for b, s in smoothquant])):
        assert len(ours) >= len(shipped[method] or ())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits  # type: ignore[no-any-return]


def run(model: nn.Module, *recipe: Any) -> None:
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens()]
    data = torch.utils.data.DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    reset_session()
    oneshot(model=model, recipe=[*recipe], dataset=data, processor=object())


@pytest.mark.parametrize("name", NAMES)
def test_the_modifiers_keep_the_function(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(name).save_pretrained(tmp_path)  # it asks for the folder that a model came from
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    if name == "mixtral":
        linearize_moe(model)
    before, old = logits(model), weights(model)
    run(model, SmoothQuantModifier(mappings=smoothquant_mappings(model)))
    assert float((logits(model) - before).abs().max() / before.abs().max()) < 1e-4
    moved = [n for n, w in weights(model).items() if not torch.equal(w, old[n])]
    assert len(moved) > len(smoothquant_mappings(model))
    monkeypatch.setattr(IntermediatesCache, "pin_memory", lambda *_: None)  # wants a GPU
    rounding = QuantizationArgs(num_bits=4, strategy="channel")
    run(
        model,
        AWQModifier(mappings=awq_mappings(model), duo_scaling=False, n_grid=4),
        QuantizationModifier(
            config_groups={"all": QuantizationScheme(targets=["Linear"], weights=rounding)},
            ignore=["lm_head"],
        ),
    )
    assert float((logits(model) - before).abs().max() / before.abs().max()) > 1e-2
    model.apply(disable_quantization)
    assert float((logits(model) - before).abs().max() / before.abs().max()) < 1e-4


def test_the_router_of_experts_is_balanced_too() -> None:
    pairs = {m.smooth_layer: m.balance_layers for m in awq_mappings(prepared("mixtral"))}
    balance = pairs["model.layers.0.post_attention_layernorm"]
    experts = [f"experts.{e}.{name}" for e in range(3) for name in ("gate_proj", "up_proj")]
    assert balance == [f"model.layers.0.mlp.{name}" for name in ("gate", *experts)]
    for e in range(3):
        at = f"model.layers.0.mlp.experts.{e}"
        assert pairs[f"{at}.up_proj"] == [f"{at}.down_proj"]
    model = prepared("mixtral")
    shipped = dict(recorded("mixtral", prepared)["awq"] or ())
    norm = "model.layers.0.post_attention_layernorm"
    assert sorted(shipped[norm]) == sorted(balance[1:])
    with disable_onloading():
        assert change_by(model, norm, shipped[norm]) > 1e-3
        assert change_by(model, norm, balance) < 1e-9


def test_packed_experts_are_refused() -> None:
    with pytest.raises(ArgumentError, match="call linearize_moe"):
        awq_mappings(build("mixtral"))


def test_a_model_that_is_no_language_model() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    inputs = torch.randn(3, 4)
    assert smoothquant_mappings(model, inputs) == [(["1"], "0")]
    assert [(m.smooth_layer, m.balance_layers) for m in awq_mappings(model)] == [
        ("0", ["1"]),
        ("1", ["3"]),
    ]
