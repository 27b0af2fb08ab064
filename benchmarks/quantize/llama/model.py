"""A Llama of two million parameters and the text that it learns: tokens, training, losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from enorm_fx.errors import ArgumentError

VOCABULARY, WINDOW = 1024, 128
SIZES: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": WINDOW,
}  # fmt: skip
BATCH, LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 16, 3e-3, 0.1, 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """Tokens of a text in int64: those to train on, and windows (N, WINDOW) that are held out."""

    train: Tensor
    held_out: Tensor


def read(path: Path, cache: Path) -> Text:
    """Byte pairs of a file of text, found in its first nine tenths; the last is held out."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    text = path.read_text(encoding="utf-8")
    cut = len(text) // 10 * 9
    kept = cache / "tokenizer.json"
    if kept.is_file():
        tokenizer = Tokenizer.from_file(str(kept))
    else:
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(
            text[:cut].splitlines(keepends=True), VOCABULARY, show_progress=False
        )
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(kept))
    train, rest = (torch.tensor(tokenizer.encode(t).ids) for t in (text[:cut], text[cut:]))
    count = len(rest) // WINDOW
    if not count:
        raise ArgumentError(f"{path} is too short: {len(rest)} tokens are held out of it")
    return Text(train, rest[: count * WINDOW].reshape(count, WINDOW))


def build(seed: int) -> Any:
    """The model with the weights that it starts training from; torch's random state stays."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **SIZES)
        return LlamaForCausalLM(config)


def trained(text: Text, seed: int, steps: int, cache: Path) -> Any:
    """The trained model in evaluation mode; from the cache if it is there."""
    model = build(seed)
    path = cache / f"llama-{seed}-{steps}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
    else:
        train_(model, text.train, seed, steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(model.state_dict(), part)
        part.rename(path)
    return model.eval().requires_grad_(False)


def train_(model: Any, tokens: Tensor, seed: int, steps: int) -> None:
    """AdamW on windows drawn at random, one cycle of the learning rate; norms of gradients cut."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARM_UP, cycle_momentum=False
    )
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(tokens) - WINDOW, (BATCH,), generator=generator)
        window = tokens[starts[:, None] + torch.arange(WINDOW)]
        loss = model(input_ids=window, labels=window).loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def losses(model: Any, windows: Tensor) -> Tensor:
    """For each window (N, WINDOW) the mean loss of its tokens but the first, in float64 (N,)."""
    found = []
    for part in windows.split(32):
        logits = model(input_ids=part).logits[:, :-1]
        each = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        found.append(each.view(len(part), -1).double().mean(1))
    return torch.cat(found)
