"""The training loop: a model, a data set, an optimizer, and ENorm after each step if wanted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import enorm_fx
from benchmarks._timing import Stopwatch
from benchmarks.data import Dataset, augment
from enorm_fx.errors import NonFiniteError

EVALUATION_BATCH = 2048


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch's figures. Losses are means over labels, in nats.

    The figures of validation are None where nothing is held out for it. seconds is the time of
    training alone, enorm_share the part of it spent in `ENorm.step`. weight_norm is the l2 norm of
    all weights of two or more axes together.
    """

    epoch: int
    learning_rate: float
    train_loss: float
    test_loss: float
    test_accuracy: float
    seconds: float
    enorm_share: float
    weight_norm: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None

    @property
    def finite(self) -> bool:
        """Whether training may go on from here."""
        return all(map(math.isfinite, (self.train_loss, self.test_loss, self.weight_norm)))


@dataclass(slots=True)
class Trainer:
    """What one run carries from epoch to epoch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    balancer: enorm_fx.ENorm | None
    data: Dataset
    batch_size: int
    generator: torch.Generator
    amp: bool = False
    total_time: Stopwatch = field(init=False)
    enorm_time: Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        device = self.data.train_images.device
        self.total_time, self.enorm_time = Stopwatch(device), Stopwatch(device)


def learning_rate(initial: float, epoch: int, epochs: int) -> float:
    """Falls linearly from `initial` in epoch 0 towards 0, reached when all epochs are done."""
    return initial * (1 - epoch / epochs)


def train(trainer: Trainer, initial_rate: float, epochs: int) -> Iterator[Epoch]:
    """Yield each epoch's figures; stops early where they cease to be finite."""
    for number in range(epochs):
        rate = learning_rate(initial_rate, number, epochs)
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate
        with trainer.total_time:
            loss = _train_epoch(trainer)
        seconds = trainer.total_time.read()
        test_loss, test_accuracy = evaluate(trainer.model, trainer.data)
        validation_loss, validation_accuracy = _validate(trainer)
        epoch = Epoch(
            epoch=number + 1,
            learning_rate=rate,
            train_loss=loss,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            seconds=seconds,
            enorm_share=trainer.enorm_time.read() / seconds,
            weight_norm=weight_norm(trainer.model),
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
        )
        yield epoch
        if not epoch.finite:
            return


def _train_epoch(trainer: Trainer) -> float:
    """One pass over the training images; their mean loss, NaN if ENorm met a non-finite weight."""
    data, device = trainer.data, trainer.data.train_images.device
    total, count = torch.zeros((), device=device), 0
    trainer.model.train()
    order = torch.randperm(len(data.train_labels), generator=trainer.generator)
    for indices in batches(order, trainer.batch_size):
        on_device = indices.to(device)
        images, labels = data.train_images[on_device], data.train_labels[on_device]
        if data.augmented:
            images = augment(images, trainer.generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=trainer.amp):
            loss = F.cross_entropy(trainer.model(images), labels)
        trainer.optimizer.zero_grad()
        torch.autograd.backward(loss)
        try:
            trainer.optimizer.step()  # it may begin with ENorm's start
            if trainer.balancer is not None:
                with trainer.enorm_time:
                    trainer.balancer.step()
        except NonFiniteError:
            return math.nan
        # Summed on the device: reading the loss at every step would wait for it.
        total += loss.detach() * len(indices)
        count += len(indices)
    return total.item() / count


def batches(order: Tensor, size: int) -> list[Tensor]:
    """Cut an order into batches; a single leftover image is dropped.

    BatchNorm finds no variance in one image, and refuses it.
    """
    cut = [order[start : start + size] for start in range(0, len(order), size)]
    return cut[:-1] if size > 1 and len(cut) > 1 and len(cut[-1]) == 1 else cut


def evaluate(model: nn.Module, data: Dataset) -> tuple[float, float]:
    """Mean loss and accuracy over the test images."""
    return _evaluate(model, data.test_images, data.test_labels)


def _validate(trainer: Trainer) -> tuple[float | None, float | None]:
    images, labels = trainer.data.validation_images, trainer.data.validation_labels
    if images is None or labels is None:
        return None, None
    return _evaluate(trainer.model, images, labels)


@torch.no_grad()
def _evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    model.eval()
    loss = torch.zeros((), device=labels.device)
    correct = torch.zeros((), device=labels.device, dtype=torch.int64)
    for start in range(0, len(labels), EVALUATION_BATCH):
        wanted = labels[start : start + EVALUATION_BATCH]
        logits = model(images[start : start + EVALUATION_BATCH])
        loss += F.cross_entropy(logits, wanted, reduction="sum")
        correct += (logits.argmax(1) == wanted).sum()
    return loss.item() / labels.numel(), correct.item() / labels.numel()


@torch.no_grad()
def weight_norm(model: nn.Module) -> float:
    """The l2 norm of all parameters of two or more axes together."""
    norms = [parameter.norm() for parameter in model.parameters() if parameter.ndim > 1]
    return float(torch.stack(norms).norm())
