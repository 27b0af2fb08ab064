"""What the demo trains: a small residual network on scikit-learn's digits."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enorm_fx.analysis import analyze
from enorm_fx.enorm import ENorm

BATCH_SIZE = 64
LEARNING_RATE = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-3
SIGMA = 2.0  # standard deviation of the log scales of a badly scaled start


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """Images (N, 1, 8, 8) and labels (N,), for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True, slots=True)
class Training:
    """One training run: a mean loss per epoch, an l2 norm per weight, times in seconds.

    diverged_in: number of the step whose loss is not finite, with which training ended; None.
    """

    train_loss: tuple[float, ...]
    diverged_in: int | None
    test_accuracy: float
    norms_before: dict[str, float]
    norms_after: dict[str, float]
    seconds: float
    enorm_seconds: float


class Block(nn.Module):
    """relu(skip(x) + conv2(relu(conv1(x))))."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, padding=1)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1)
        self.skip = nn.Identity() if fan_in == fan_out else nn.Conv2d(fan_in, fan_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.conv2(F.relu(self.conv1(x))))


class DigitReader(nn.Module):
    """A stem, four residual blocks, a linear classifier: 11 weights, no normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.block1 = Block(16, 16)
        self.block2 = Block(16, 16)
        self.block3 = Block(16, 32)
        self.block4 = Block(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(F.relu(self.stem(x))))
        x = self.block4(self.block3(F.max_pool2d(x, 2)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def badly_scaled(model: nn.Module, example: Tensor, seed: int) -> nn.Module:
    """A copy with the same function, each unit rescaled by e^x, x normal with deviation SIGMA."""
    copied = copy.deepcopy(model)
    plan = analyze(copied, example)
    random = torch.Generator().manual_seed(seed)
    plan.rescale_(SIGMA * torch.randn(plan.num_scales, dtype=torch.float64, generator=random))
    return copied


def train(
    model: nn.Module,
    data: Digits,
    *,
    epochs: int,
    seed: int,
    use_enorm: bool,
    on_epoch: Callable[[], None],
) -> Training:
    """Train with SGD, and with ENorm after each of its steps if `use_enorm`.

    Args:
        model: trained in place.
        seed: of the order of the images; the same in both runs.
        on_epoch: called after every epoch.
    """
    norms_before = _weight_norms(model)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    enorm = ENorm(model, optimizer) if use_enorm else None
    shuffle = torch.Generator().manual_seed(seed)
    losses, steps, enorm_seconds, started = [], 0, 0.0, time.perf_counter()
    diverged_in = None
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - epoch / epochs)
        total = 0.0
        order = torch.randperm(len(data.train_labels), generator=shuffle)
        for start in range(0, len(order) if diverged_in is None else 0, BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            steps += 1
            if not math.isfinite(loss.item()):
                diverged_in = steps
                break
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            if enorm is not None:
                paused = time.perf_counter()
                enorm.step()
                enorm_seconds += time.perf_counter() - paused
            total += loss.item() * len(batch)
        if diverged_in is None:
            losses.append(total / len(order))
        on_epoch()
    return Training(
        train_loss=tuple(losses),
        diverged_in=diverged_in,
        test_accuracy=_accuracy(model, data),
        norms_before=norms_before,
        norms_after=_weight_norms(model),
        seconds=time.perf_counter() - started,
        enorm_seconds=enorm_seconds,
    )


def load_digits(seed: int) -> Digits:
    """scikit-learn's 1,797 digits; a fifth of each class is kept for testing."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    digits = datasets.load_digits()
    train_images, test_images, train_labels, test_labels = train_test_split(
        digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=seed
    )
    mean, std = train_images.mean(), train_images.std()
    dtype = torch.get_default_dtype()
    return Digits(
        train_images=torch.from_numpy((train_images - mean) / std).to(dtype).unsqueeze(1),
        train_labels=torch.from_numpy(train_labels),
        test_images=torch.from_numpy((test_images - mean) / std).to(dtype).unsqueeze(1),
        test_labels=torch.from_numpy(test_labels),
    )


@torch.no_grad()
def _accuracy(model: nn.Module, data: Digits) -> float:
    """The share of the test images that are read correctly."""
    correct = model(data.test_images).argmax(1) == data.test_labels
    return float(correct.double().mean())


@torch.no_grad()
def _weight_norms(model: nn.Module) -> dict[str, float]:
    """The l2 norm of every parameter of two or more axes, in the model's order."""
    return {
        layer_name(name): parameter.norm().item()
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
    }


def layer_name(parameter: str) -> str:
    """A layer's weight goes by the layer's name."""
    return parameter.removesuffix(".weight")
