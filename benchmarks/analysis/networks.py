"""Networks that grow: what an analysis costs a block is measured on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, GROWTH = 64, 4


class Residual(nn.Module):
    """relu(x + second(relu(first(x)))), again and again."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.first = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        for first, second in zip(self.first, self.second, strict=True):
            x = self.relu(x + second(self.relu(first(x))))
        y: Tensor = self.head(x)
        return y


class Dense(nn.Module):
    """Every layer reads what all layers before it made."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH + layers * GROWTH, 10)
        self.layers = nn.ModuleList(nn.Linear(WIDTH + i * GROWTH, GROWTH) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        for layer in self.layers:
            x = torch.cat([x, self.relu(layer(x))], 1)
        y: Tensor = self.head(x)
        return y


def chain(layers: int) -> nn.Module:
    """Linear layers with a ReLU after each."""
    pairs = ((nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(layers))
    return nn.Sequential(*(module for pair in pairs for module in pair))


def llama(layers: int, width: int = 8192) -> nn.Module:
    """Llama's layout at the width of its 70B model, grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=7 * width // 2, num_hidden_layers=layers,
        num_attention_heads=64, num_key_value_heads=8, vocab_size=128_256,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokens() -> dict[str, Any]:
    """What a language model is given."""
    return {"input_ids": torch.zeros((1, 16), dtype=torch.int64, device="meta"), "use_cache": False}


BUILDERS: Mapping[str, Callable[[int], nn.Module]] = {
    "chain": chain,
    "residual": Residual,
    "dense": Dense,
    "llama": llama,
}
SIZES: Mapping[str, tuple[int, ...]] = {
    "chain": (100, 400, 1000, 4000),
    "residual": (100, 400, 1000, 4000),
    "dense": (50, 100, 200, 500),
    "llama": (8, 32, 80),
}


def build(kind: str, size: int) -> tuple[nn.Module, Any]:
    """A network on the meta device, in evaluation mode, and inputs for it."""
    with torch.device("meta"):
        model = BUILDERS[kind](size).eval()
    return model, tokens() if kind == "llama" else torch.zeros(1, WIDTH, device="meta")
