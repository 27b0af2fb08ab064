"""Language models of transformers, tiny and random, and what a pair of modules does to them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

hf = pytest.importorskip("transformers")

hf.logging.set_verbosity_error()

_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_SAME_HEADS, _FEWER_HEADS = {"num_key_value_heads": 4}, {"num_key_value_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 24}


def _config(kind: str, **more: Any) -> Any:
    sizes = {**_SIZES, "intermediate_size": 48, **more}
    return getattr(hf, f"{kind}Config")(
        **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False
    )


_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _config("Llama", **_SAME_HEADS),
    "llama, grouped queries": lambda: _config("Llama", **_FEWER_HEADS),
    "qwen2": lambda: _config("Qwen2", **_SAME_HEADS),
    "qwen3": lambda: _config("Qwen3", head_dim=8, **_SAME_HEADS),
    "mixtral": lambda: _config("Mixtral", num_local_experts=3, **_SAME_HEADS, **_EXPERTS),
    "phi": lambda: _config("Phi"),
    "phi3": lambda: _config("Phi3"),
    "opt": lambda: _config("OPT", ffn_dim=48, word_embed_proj_dim=32),
    "gemma": lambda: _config("Gemma", head_dim=8, **_SAME_HEADS),
    "gemma2": lambda: _config("Gemma2", head_dim=8, **_SAME_HEADS),
    "gemma3": lambda: _config("Gemma3Text", head_dim=8, **_SAME_HEADS),
}
NAMES = list(_CONFIGS)


def build(name: str) -> nn.Module:
    """The model in evaluation mode, with weights large enough that every part has an effect."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = hf.AutoModelForCausalLM.from_config(_CONFIGS[name]())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() < 2:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                else:
                    parameter.mul_(5)
    return model.eval()


def tokens() -> Tensor:
    return torch.arange(48).reshape(4, 12) % 50


def inputs() -> dict[str, Any]:
    return {"input_ids": tokens()}


class _PlainNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def with_plain_norms(model: nn.Module) -> nn.Module:
    """The same function, with weights 1 + w where norms multiply by 1 + w, as Gemma's do."""
    for name, module in [*model.named_modules()]:
        kind = type(module).__name__
        if kind.startswith("Gemma") and kind.endswith("RMSNorm"):
            model.set_submodule(name, _PlainNorm(1 + module.weight.detach(), module.eps))
    return model


def change_by(model: nn.Module, smooth_layer: str, balance_layers: Iterable[str]) -> float:
    """Scale a pair of modules as SmoothQuant and AWQ do, on a copy in float64: the largest change
    of the output, relative to its largest entry.

    The last outputs of the smooth layer are divided by random scales, the columns of the balance
    layers multiplied.
    """
    model = copy.deepcopy(model).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the default one takes no float64
    balance = [model.get_submodule(name) for name in balance_layers]
    with torch.no_grad():
        before = model(tokens()).logits
        size = balance[0].weight.shape[1]  # type: ignore[index, union-attr]
        generator = torch.Generator().manual_seed(1)
        scales = torch.randn(size, generator=generator, dtype=torch.float64).mul(0.3).exp()
        smooth: Any = model.get_submodule(smooth_layer)
        smooth.weight[-size:] /= scales.view(-1, *[1] * (smooth.weight.dim() - 1))
        if getattr(smooth, "bias", None) is not None:
            smooth.bias /= scales
        for module in balance:
            module.weight *= scales  # type: ignore[operator, assignment]
        after = model(tokens()).logits
    return float((after - before).abs().max() / before.abs().max())
