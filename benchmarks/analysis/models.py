"""Real models: medians of several analyses after a first one, which fills torch's caches.

Models are built once. With transformers installed, Llama's layout (32 layers of width 4096) on the
meta device as well.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models import get_model

import enorm_fx
from benchmarks._memory import peak

_TORCHVISION = ("resnet50", "resnet152", "densenet121", "densenet201", "vit_l_16")


def llama() -> tuple[nn.Module, Any]:
    """32 layers of width 4096, grouped queries, without memory for the weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tokens = torch.zeros((1, 16), dtype=torch.int64, device="meta")
    return model.eval(), {"input_ids": tokens, "use_cache": False}


def measure(build: Callable[[], tuple[nn.Module, Any]], repeats: int) -> dict[str, Any]:
    """Seconds of one first and several further analyses, and what was found."""
    model, inputs = build()
    before = peak()
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        plan = enorm_fx.analyze(model, inputs, batchnorm="affine")
        seconds.append(time.perf_counter() - begin)
    return {
        "first": seconds[0],
        "median": statistics.median(seconds[1:]),
        "fastest": min(seconds[1:]),
        "slowest": max(seconds[1:]),
        "scales": plan.num_scales,
        "groups": len(plan.groups),
        "peak_growth_mib": (peak() - before) / 2**20,
    }


def builders() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """Name -> what builds the model and its inputs."""
    found: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
        name: partial(_torchvision, name) for name in _TORCHVISION
    }
    if importlib.util.find_spec("transformers"):
        found["llama 32 x 4096 (meta)"] = llama
    return found


def _torchvision(name: str) -> tuple[nn.Module, Any]:
    return get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)
