"""`enorm-fx demo`: a small residual network learns to read digits, with and without ENorm.

Both runs start from the same weights and see the same batches. The network has no
normalization layers, so a rescaling keeps its function exactly. Needs the extras of
`pip install 'enorm-fx[demo]'`; they are imported when the demo runs, not before.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.syntax import Syntax
from rich.table import Table
from torch import Tensor, nn

import enorm_fx
from enorm_fx._demo_plot import draw
from enorm_fx.errors import ArgumentError, EnormError
from enorm_fx.plan import Plan

BATCH_SIZE = 64
LEARNING_RATE = 0.02
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-3

TWO_LINES = """\
enorm = enorm_fx.ENorm(model, optimizer)      # once, before training
for images, labels in batches:
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    enorm.step()                              # after every step of the optimizer
"""


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """Images (N, 1, 8, 8) and labels (N,), for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True, slots=True)
class Training:
    """One training run: a mean loss per epoch, an l2 norm per weight, times in seconds."""

    train_loss: tuple[float, ...]
    test_accuracy: float
    norms_before: dict[str, float]
    norms_after: dict[str, float]
    seconds: float
    enorm_seconds: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The runs without and with ENorm, and where the picture lies."""

    without: Training
    with_enorm: Training
    picture: Path


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


def run(
    console: Console,
    output: Path = Path("enorm_demo.png"),
    epochs: int = 30,
    seed: int = 0,
) -> DemoResult:
    """Train twice, print what was found and measured, draw the curves into `output`.

    The same seed gives the same figures on the same machine, times aside. The caller's random
    numbers are left as they were.
    """
    _check(output, epochs)
    data = _load_digits(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = DigitReader()
    plan = enorm_fx.analyze(model, data.train_images[:2])
    _print_opening(console, data, plan)
    with _one_thread(), Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=2 * epochs)
        without, with_enorm = (
            _train(
                copy.deepcopy(model),
                data,
                epochs=epochs,
                seed=seed,
                use_enorm=use_enorm,
                on_epoch=lambda: progress.advance(task),
            )
            for use_enorm in (False, True)
        )
    draw(output, without, with_enorm)
    console.print(_closing_table(without, with_enorm))
    console.print(
        "One run each: with another seed the difference may vanish or turn around.\n"
        f"Loss by epoch and norm of every layer: {output}",
        markup=False,
        highlight=False,
    )
    return DemoResult(without, with_enorm, output)


def _train(
    model: nn.Module,
    data: Digits,
    *,
    epochs: int,
    seed: int,
    use_enorm: bool,
    on_epoch: Callable[[], None],
) -> Training:
    norms_before = _weight_norms(model)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    enorm = enorm_fx.ENorm(model, optimizer) if use_enorm else None
    shuffle = torch.Generator().manual_seed(seed)
    losses, enorm_seconds, started = [], 0.0, time.perf_counter()
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - epoch / epochs)
        total = 0.0
        order = torch.randperm(len(data.train_labels), generator=shuffle)
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            if enorm is not None:
                paused = time.perf_counter()
                enorm.step()
                enorm_seconds += time.perf_counter() - paused
            total += loss.item() * len(batch)
        losses.append(total / len(order))
        on_epoch()
    return Training(
        train_loss=tuple(losses),
        test_accuracy=_accuracy(model, data),
        norms_before=norms_before,
        norms_after=_weight_norms(model),
        seconds=time.perf_counter() - started,
        enorm_seconds=enorm_seconds,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """The network is too small for more, and sums do not depend on the machine's cores then."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check(output: Path, epochs: int) -> None:
    """Refuse now what would otherwise fail after the training."""
    needed = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise EnormError(f"the demo needs {' and '.join(missing)}: pip install 'enorm-fx[demo]'")
    if epochs < 1:
        raise ArgumentError(f"epochs must be 1 or more, not {epochs}")
    if output.suffix.lower() != ".png":
        raise ArgumentError(f"the demo draws a PNG: {output} must end in .png")
    if not output.parent.is_dir():
        raise ArgumentError(f"{output.parent}, where the picture should go, is no folder")


def _load_digits(seed: int) -> Digits:
    """scikit-learn's 1,797 digits; a fifth of each class is kept for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
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
    correct = model(data.test_images).argmax(1) == data.test_labels
    return float(correct.double().mean())


@torch.no_grad()
def _weight_norms(model: nn.Module) -> dict[str, float]:
    """l2 norm of every parameter of two or more axes, in the model's order."""
    return {
        _layer(name): parameter.norm().item()
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
    }


def _layer(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def _total(norms: dict[str, float]) -> float:
    return math.hypot(*norms.values())


def _print_opening(console: Console, data: Digits, plan: Plan) -> None:
    console.print(
        f"A residual ReLU network without normalization, {len(data.train_labels)} digits to learn "
        f"from, {len(data.test_labels)} to test on.\nENorm is two lines of the training loop:\n",
        highlight=False,
    )
    console.print(Syntax(TWO_LINES, "python", background_color="default"))
    table = Table(title=f"{len(plan.pairs)} rescalable pairs, {plan.num_scales} free scales")
    for column in ("producer", "consumer"):
        table.add_column(column)
    table.add_column("channels", justify="right")
    table.add_column("via")
    for pair in plan.pairs:
        table.add_row(
            _layer(pair.producer), _layer(pair.consumer), str(pair.channels), ", ".join(pair.via)
        )
    table.caption = _left_out(plan)
    console.print(table)


def _left_out(plan: Plan) -> str:
    """What ENorm's default, `last_layer=False`, does not use of the plan."""
    last = {parameter.name for parameter in plan.parameters if parameter.last}
    groups = [group for group in plan.groups if last & {*group.producers, *group.consumers}]
    scales = sum(group.channels for group in groups)
    names = ", ".join(sorted(map(_layer, last)))
    return f"by default ENorm leaves out the {scales} scales that move the last weight ({names})"


def _closing_table(without: Training, with_enorm: Training) -> Table:
    table = Table(title=f"after {len(without.train_loss)} epochs")
    for column in ("", "without ENorm", "with ENorm"):
        table.add_column(column, justify="right" if column else "left")
    runs = (without, with_enorm)

    def row(label: str, figure: Callable[[Training], str]) -> None:
        table.add_row(label, *map(figure, runs))

    row("test accuracy", lambda run: f"{run.test_accuracy:.2%}")
    row("training loss", lambda run: f"{run.train_loss[-1]:.4f}")
    row("weight norm before", lambda run: f"{_total(run.norms_before):.2f}")
    row("weight norm after", lambda run: f"{_total(run.norms_after):.2f}")
    row("training time", lambda run: f"{run.seconds:.1f} s")
    row("of it in ENorm", lambda run: f"{run.enorm_seconds / run.seconds:.1%}")
    return table
