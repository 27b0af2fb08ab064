"""Keys and values in a cache of the transformers library: the model's own, or the caller's."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import enorm_fx
from enorm_fx.tracing.outputs import outputs_of, own_caches
from tests.support.tracing_kit import ROWS, structure, two_layers

IDS = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))


# --- with a class that stands for the library's ------------------------------------------------


class Cache:
    def __init__(self) -> None:
        self.layers: list[Tensor] = []


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("transformers.cache_utils")
    module.Cache = Cache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.cache_utils", module)


class Caching(nn.Module):
    """Two layers; what is between them goes into a cache, the caller's or one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor, cache: Any = None) -> dict[str, Any]:
        cache = Cache() if cache is None else cache
        cache.layers.append(self.a(x).relu())
        return {"y": self.b(cache.layers[-1]), "cache": cache}


@pytest.mark.usefixtures("library")
def test_a_cache_that_the_model_made_is_inside_it() -> None:
    plan = enorm_fx.analyze(Caching(), ROWS)
    assert plan.num_scales == 4
    assert any("do not go on with a cache" in note for note in plan.notes)
    assert enorm_fx.verify(plan, ROWS).largest_change < 1e-12
    assert enorm_fx.count_symmetries(Caching(), ROWS) == 4


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("keyword", [True, False])
def test_a_cache_that_is_handed_in_is_the_callers(keyword: bool) -> None:
    cache = Cache()
    plan = enorm_fx.analyze(Caching(), {"x": ROWS, "cache": cache} if keyword else (ROWS, cache))
    assert plan.num_scales == 0
    assert plan.notes == ()
    assert cache.layers == []


def test_another_class_of_that_name_is_an_output() -> None:
    assert enorm_fx.analyze(Caching(), ROWS).num_scales == 0
    cache = Cache()
    cache.layers.append(torch.ones(2))
    assert len(list(outputs_of({"cache": cache}))) == 1


@pytest.mark.parametrize("kind", [dict, list])
def test_what_is_put_into_an_input_leaves_the_model(kind: Callable[[], Any]) -> None:
    def run(m: Any, x: Tensor, store: Any) -> Tensor:
        y = m.a(x)
        store.update(y=y) if isinstance(store, dict) else store.append(y)
        return m.b(y.relu())

    store = kind()
    assert enorm_fx.analyze(two_layers(run), (ROWS, store)).num_scales == 0
    assert not store


# --- with the library itself -------------------------------------------------------------------

SMALL: dict[str, Any] = {"vocab_size": 40, "num_attention_heads": 4}
WIDE: dict[str, Any] = {**SMALL, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama": ("ForCausalLM", {**WIDE, "num_key_value_heads": 2}, 152),
    "Mistral": ("ForCausalLM", {**WIDE, "num_key_value_heads": 2, "sliding_window": 4}, 152),
    "Phi": ("ForCausalLM", WIDE, 104),
    "GPTJ": ("ForCausalLM", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4,
                             "rotary_dim": 2, "bos_token_id": 1, "eos_token_id": 2}, 104),
    "GPT2": ("LMHeadModel", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4,
                             "bos_token_id": 1, "eos_token_id": 2}, 128),
    "OPT": ("ForCausalLM", {**SMALL, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2,
                            "word_embed_proj_dim": 16}, 176),
    "T5": ("ForConditionalGeneration", {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24,
                                        "num_layers": 2, "num_heads": 4}, 448),
}  # fmt: skip


def small(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    suffix, options, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    model: nn.Module = getattr(transformers, f"{name}{suffix}")(config)
    return model.eval().double()


def keyword(model: nn.Module) -> str:
    """What the library calls the cache among its inputs; it was renamed."""
    names = inspect.signature(model.forward).parameters
    return "past_key_values" if "past_key_values" in names else "cache"


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_is_the_same_with_a_cache_and_without(name: str) -> None:
    model = small(name)
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if name == "T5" else {})}
    plan = enorm_fx.analyze(model, inputs)
    without = enorm_fx.analyze(model, {**inputs, "use_cache": False})
    assert structure(plan) == structure(without)
    assert plan.num_scales == MODELS[name][2]
    assert any("use_cache" in note for note in plan.notes)
    assert without.notes == ()
    assert enorm_fx.verify(plan, inputs).largest_change < 1e-11


def test_generation_goes_on_after_a_rescaling_with_a_new_cache() -> None:
    model = small("Llama")
    plan = enorm_fx.analyze(model, {"input_ids": IDS})
    generator = torch.Generator().manual_seed(1)

    def two_steps(old: Any = None) -> list[Tensor]:
        with torch.no_grad():
            first = model(IDS)
            (cache,) = own_caches(first) if old is None else (old,)
            return [first.logits, model(IDS[:, :1], **{keyword(model): cache}).logits]

    before = two_steps()
    with torch.no_grad():
        (old,) = own_caches(model(IDS))
    plan.rescale_(0.3 * torch.randn(plan.num_scales, dtype=torch.float64, generator=generator))
    for one, two in zip(before, two_steps(), strict=True):
        torch.testing.assert_close(one, two)
    assert not torch.allclose(before[1], two_steps(old)[1])  # what the note warns of


@pytest.mark.parametrize("filled", [True, False])
def test_a_cache_of_the_callers_is_pinned_and_left_alone(filled: bool) -> None:
    model = small("Llama")
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)  # type: ignore[arg-type]
    if filled:
        (cache,) = own_caches(model(IDS))
    length = cache.get_seq_length()
    plan = enorm_fx.analyze(model, {"input_ids": IDS, keyword(model): cache})
    assert plan.num_scales == MODELS["Llama"][2] - 24  # keys and values of 2 layers, 12 each
    assert cache.get_seq_length() == length
    assert not any("use_cache" in note for note in plan.notes)
