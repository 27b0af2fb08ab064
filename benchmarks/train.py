"""Does ENorm help training? The networks of the paper, trained with and without it.

    python -m benchmarks.train --dataset fashion-mnist --model-type linear --n-layers 15 \\
        --epochs 10 --lr 0.1 --weight-decay 1e-3 --momentum 0 --enorm 1.2 --n-iter 3

One command trains one configuration, --n-iter times from different seeds, and writes one JSON
file with every figure. `python -m benchmarks.train_summary` puts such files side by side.

A run whose loss, or whose weights, cease to be finite is marked as diverged: it stops there and
its final accuracy is the one it had then.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import enorm_fx
from benchmarks._environment import RESULTS, environment, write_json
from benchmarks._training import Epoch, Trainer, train
from benchmarks.data import Dataset, load
from benchmarks.models import fully_connected, fully_convolutional
from enorm_fx.errors import ArgumentError, EnormError


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line's options, one by one."""

    dataset: str
    data_path: Path | None
    model_type: str
    n_layers: int
    batchnorm: bool
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    momentum: float
    enorm: float
    n_iter: int
    seed: int
    device: str
    output: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one configuration and write its figures; returns the exit status."""
    settings = parse_arguments(arguments)
    console = Console()
    try:
        record = measure(settings, console)
        output = settings.output or RESULTS / f"{default_name(settings)}.json"
        write_json(output, record)
    except (EnormError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False)
        return 2
    console.print(_closing_line(record["summary"]), markup=False)
    console.print(f"written: {output}", markup=False)
    return 0


def measure(settings: Settings, console: Console) -> dict[str, Any]:
    """Train `n_iter` times; every figure as one record that fits JSON."""
    device = _device(settings.device)
    data = load(settings.dataset, settings.data_path, device)
    runs: list[dict[str, Any]] = []
    description: dict[str, Any] = {}
    with _progress(console) as progress:
        task = progress.add_task("training", total=settings.n_iter * settings.epochs)
        for run in range(settings.n_iter):
            trainer, description = prepare(settings, data, settings.seed + run)
            epochs = []
            for epoch in train(trainer, settings.lr, settings.epochs):
                epochs.append(epoch)
                progress.update(task, completed=run * settings.epochs + len(epochs))
                progress.console.print(_epoch_line(run, epoch), markup=False, highlight=False)
            runs.append(_run_record(run, settings.seed + run, epochs))
            progress.update(task, completed=len(runs) * settings.epochs)
    arguments = asdict(settings) | {"data_path": settings.data_path and str(settings.data_path)}
    del arguments["output"]
    return {
        "benchmark": "train",
        "environment": environment(device, settings.seed),
        "arguments": arguments,
        "data": _data_record(data),
        "model": description,
        "runs": runs,
        "summary": summarize(runs),
    }


def prepare(settings: Settings, data: Dataset, seed: int) -> tuple[Trainer, dict[str, Any]]:
    """A fresh model with its optimizer, and a description of the model.

    The caller's random numbers are left as they were.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _build(settings, data).to(data.train_images.device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    description: dict[str, Any] = {
        "weights": len(weights),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    balancer = None
    if settings.enorm:
        plan = enorm_fx.analyze(model, data.train_images[:2])
        balancer = enorm_fx.ENorm(plan, optimizer, c=settings.enorm, start="as_is")
        description |= {
            "pairs": len(plan.pairs),
            "num_scales": plan.num_scales,
            "exact": plan.exact,
        }
    generator = torch.Generator().manual_seed(seed)
    trainer = Trainer(model, optimizer, balancer, data, settings.batch_size, generator)
    return trainer, description


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over all runs, the diverged ones too; the sample deviation needs two runs."""
    accuracies = [run["final_accuracy"] for run in runs]
    epochs = [epoch for run in runs for epoch in run["epochs"]]
    return {
        "runs": len(runs),
        "diverged": sum(run["diverged"] for run in runs),
        "final_accuracy_mean": statistics.mean(accuracies),
        "final_accuracy_std": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "final_train_loss_mean": statistics.mean(run["epochs"][-1]["train_loss"] for run in runs),
        "final_weight_norm_mean": statistics.mean(run["epochs"][-1]["weight_norm"] for run in runs),
        "seconds_per_epoch_median": statistics.median(epoch["seconds"] for epoch in epochs),
        "enorm_share_median": statistics.median(epoch["enorm_share"] for epoch in epochs),
    }


def _run_record(run: int, seed: int, epochs: Sequence[Epoch]) -> dict[str, Any]:
    return {
        "run": run,
        "seed": seed,
        "diverged": not epochs[-1].finite,
        "final_accuracy": epochs[-1].test_accuracy,
        "epochs": [asdict(epoch) for epoch in epochs],
    }


def _data_record(data: Dataset) -> dict[str, Any]:
    return {
        "image_shape": list(data.train_images.shape[1:]),
        "train_images": len(data.train_labels),
        "test_images": len(data.test_labels),
        "augmented": data.augmented,
    }


def _build(settings: Settings, data: Dataset) -> nn.Module:
    shape = data.train_images.shape[1:]
    if settings.model_type == "linear":
        return fully_connected(
            shape.numel(), settings.n_layers, data.classes, batchnorm=settings.batchnorm
        )
    return fully_convolutional(shape[0], data.classes, batchnorm=settings.batchnorm)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {name} cannot be used here: {error}") from error
    return device


def default_name(settings: Settings) -> str:
    """A file name that tells the configurations apart."""
    model = f"linear{settings.n_layers}" if settings.model_type == "linear" else "conv"
    norm = "bn" if settings.batchnorm else "nobn"
    return f"train-{settings.dataset}-{model}-{norm}-enorm{settings.enorm:g}"


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TextColumn("epochs"), TimeRemainingColumn(), console=console)


def _epoch_line(run: int, epoch: Epoch) -> str:
    return (
        f"run {run + 1} epoch {epoch.epoch}: train loss {epoch.train_loss:.4g}, "
        f"test loss {epoch.test_loss:.4g}, accuracy {epoch.test_accuracy:.2%}, "
        f"norm {epoch.weight_norm:.4g}, {epoch.seconds:.1f} s, ENorm {epoch.enorm_share:.0%}"
    )


def _closing_line(summary: dict[str, Any]) -> str:
    deviation = summary["final_accuracy_std"]
    spread = "" if deviation is None else f" ± {deviation:.2%}"
    diverged = f", {summary['diverged']} diverged" if summary["diverged"] else ""
    return (
        f"final test accuracy {summary['final_accuracy_mean']:.2%}{spread} "
        f"({summary['runs']} runs{diverged})"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{number} is not a finite number of 0 or more")
    return number


def parse_arguments(arguments: Sequence[str] | None) -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description="Train the paper's networks with or without ENorm.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", choices=("cifar10", "fashion-mnist", "digits"), default="cifar10")
    add("--data-path", type=Path, help="folder of the data set's files (not for digits)")
    add("--model-type", choices=("linear", "conv"), default="linear")
    add("--n-layers", type=_positive, default=15, help="intermediary layers of the linear model")
    add("--batchnorm", action=argparse.BooleanOptionalAction, default=True, help="use BatchNorm")
    add("--epochs", type=_positive, default=60)
    add("--batch-size", type=_positive, default=256)
    add("--lr", type=_not_negative, default=0.1, help="first learning rate; falls linearly to 0")
    add("--weight-decay", type=_not_negative, default=1e-3)
    add("--momentum", type=_not_negative, default=0.0)
    add("--enorm", type=_not_negative, default=0.0, metavar="C", help="ENorm's c; 0: no ENorm")
    add("--n-iter", type=_positive, default=1, help="runs, each from its own seed")
    add("--seed", type=int, default=0, help="seed of the first run; the next ones count up")
    add("--device", default="cpu")
    add("--output", type=Path, metavar="FILE", help="JSON file (default: in benchmarks/results)")
    return Settings(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
