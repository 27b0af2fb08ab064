"""Train a network of `networks` on Fashion-MNIST, once: the weights are kept as safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.data import Dataset
from benchmarks.quantize.networks import build, fold_

BATCH, LEARNING_RATE = 128, 6e-3
EPOCHS = {"mobilenet": 5, "resnet, BatchNorm": 4, "resnet, no BatchNorm": 4, "vgg": 4, "mlp": 12}


def trained(name: str, seed: int, data: Dataset, cache: Path) -> nn.Sequential:
    """The trained network in evaluation mode, BatchNorm folded; from the cache if it is there."""
    model = build(name, seed)
    stem = name.replace(", ", "-").replace(" ", "-")
    path = cache / f"{stem}-{seed}-{EPOCHS[name]}.safetensors"  # other epochs, other weights
    if path.is_file():
        model.load_state_dict(load_file(path))
    else:
        train_(model, data, seed, EPOCHS[name])
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(model.state_dict(), part)
        part.rename(path)
    fold_(model)
    return model.requires_grad_(False)


def train_(model: nn.Module, data: Dataset, seed: int, epochs: int) -> None:
    """Adam, one cycle of the learning rate; images mirrored at random, norms of gradients cut."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    steps = len(data.train_images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * steps
    )
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data.train_images), generator=generator)
        for step in range(steps):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            images = data.train_images[chosen]
            if torch.rand((), generator=generator) < 0.5:
                images = images.flip(3)
            loss = F.cross_entropy(model(images), data.train_labels[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images (N, 1, 28, 28) whose class (N,) the model says."""
    right = [
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.split(100), labels.split(100), strict=True)
    ]
    return sum(right) / len(labels)
