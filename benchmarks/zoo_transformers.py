"""Models of transformers with small random configurations: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

hf.logging.set_verbosity_error()

_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
_IMAGE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_SEQ2SEQ = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}  # fmt: skip


def _tokens() -> torch.Tensor:
    return torch.arange(24).reshape(2, 12) % 50


def _causal(model: str, **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    made = getattr(hf, f"{model}Config")(**config)
    head = "GPT2LMHeadModel" if model == "GPT2" else f"{model}ForCausalLM"
    return getattr(hf, head)(made), {"input_ids": _tokens(), "use_cache": False}


def _encoder(model: str) -> tuple[nn.Module, dict[str, Any]]:
    made = getattr(hf, f"{model}Config")(**_TEXT)
    return getattr(hf, f"{model}Model")(made), {"input_ids": _tokens()}


def _seq2seq(model: str, **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    made = getattr(hf, f"{model}Config")(**config)
    inputs = {"input_ids": _tokens(), "decoder_input_ids": _tokens(), "use_cache": False}
    return getattr(hf, f"{model}ForConditionalGeneration")(made), inputs


def _classifier(model: str, **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    made = getattr(hf, f"{model}Config")(**config)
    images = torch.randn(2, 3, 32, 32)
    return getattr(hf, f"{model}ForImageClassification")(made), {"pixel_values": images}


def _opt() -> tuple[nn.Module, dict[str, Any]]:
    config = {**_TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}
    model, inputs = _causal("OPT", **config)
    return model, {**inputs, "attention_mask": torch.ones(2, 12, dtype=torch.long)}


def _whisper() -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = _seq2seq(
        "Whisper", **_SEQ2SEQ, num_mel_bins=8, max_source_positions=16, max_target_positions=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    del inputs["input_ids"]
    return model, {**inputs, "input_features": torch.randn(2, 8, 32)}


def _clip() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.CLIPConfig(
        text_config={**_TEXT, "projection_dim": 16, "eos_token_id": 49},
        vision_config={**_IMAGE, "projection_dim": 16},
        projection_dim=16,
    )
    return hf.CLIPModel(config), {
        "input_ids": _tokens(),
        "pixel_values": torch.randn(2, 3, 32, 32),
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
    }


_BUILDERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "opt": _opt,
    "gpt2": lambda: _causal(
        "GPT2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64
    ),
    "llama": lambda: _causal("Llama", **_TEXT, num_key_value_heads=2),
    "mistral": lambda: _causal("Mistral", **_TEXT, num_key_value_heads=2),
    "qwen2": lambda: _causal("Qwen2", **_TEXT, num_key_value_heads=2),
    "gemma": lambda: _causal("Gemma", **_TEXT, num_key_value_heads=2, head_dim=8),
    "bert": lambda: _encoder("Bert"),
    "roberta": lambda: _encoder("Roberta"),
    "t5": lambda: _seq2seq(
        "T5", vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    ),
    "bart": lambda: _seq2seq("Bart", **_SEQ2SEQ, max_position_embeddings=64),
    "vit": lambda: _classifier("ViT", **_IMAGE),
    "swin": lambda: _classifier(
        "Swin", image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
        window_size=4,
    ),
    "resnet": lambda: _classifier(
        "ResNet", embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2]
    ),
    "convnext": lambda: _classifier(
        "ConvNext", hidden_sizes=[16, 32], depths=[2, 2], num_stages=2
    ),
    "whisper": _whisper,
    "clip": _clip,
    "mamba": lambda: _causal(
        "Mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4
    ),
}  # fmt: skip


def names() -> list[str]:
    """One model of each kind."""
    return list(_BUILDERS)


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model, with weights large enough that every part has an effect, and its inputs."""
    model, inputs = _BUILDERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(5)
    return model, inputs
