"""Does ENorm help training? The networks of the paper, trained with and without it.

    python -m benchmarks.train --dataset fashion-mnist --model-type linear --n-layers 15 \\
        --epochs 10 --lr 0.1 --weight-decay 1e-3 --momentum 0 --enorm 1.2 --n-iter 3

One command trains one configuration, --n-iter times from different seeds, and writes one JSON
file with every figure, anew after every run: what was stopped goes on with --resume.
`python -m benchmarks.train_summary` puts such files side by side, and `python -m benchmarks.sweep`
trains many configurations.

A run whose loss, or whose weights, cease to be finite is marked as diverged: it stops there and
its final accuracy is the one it had then.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import enorm_fx
from benchmarks._environment import RESULTS, environment, write_json
from benchmarks._settings import Settings, default_name, parse_arguments
from benchmarks._training import Epoch, Trainer, train
from benchmarks.data import Dataset, load, reduced
from benchmarks.models import Transformer, fully_connected, fully_convolutional, residual, vgg
from enorm_fx.errors import ArgumentError, EnormError


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one configuration and write its figures; returns the exit status."""
    settings = parse_arguments(arguments)
    console = Console()
    try:
        output = settings.output or RESULTS / f"{default_name(settings)}.json"
        record = measure(settings, console, output)
    except (EnormError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False)
        return 2
    console.print(_closing_line(record["summary"]), markup=False)
    console.print(f"written: {output}", markup=False)
    return 0


def measure(settings: Settings, console: Console, output: Path) -> dict[str, Any]:
    """Train `n_iter` times; every figure as one record, which is written after every run."""
    device = use_device(settings.device)
    data = prepare_data(settings, device)
    arguments = asdict(settings) | {"data_path": settings.data_path and str(settings.data_path)}
    for name in ("output", "resume", "n_iter"):
        del arguments[name]
    runs = _runs_of(output, arguments) if settings.resume else []
    record: dict[str, Any] = {}
    with _progress(console) as progress:
        task = progress.add_task("training", total=settings.n_iter * settings.epochs)
        for run in range(settings.n_iter):
            trainer, description = prepare(settings, data, settings.seed + run)
            if run == len(runs):
                epochs = []
                for epoch in train(trainer, settings.lr, settings.epochs):
                    epochs.append(epoch)
                    progress.update(task, completed=run * settings.epochs + len(epochs))
                    progress.console.print(_epoch_line(run, epoch), markup=False, highlight=False)
                runs.append(_run_record(run, settings.seed + run, epochs))
            progress.update(task, completed=(run + 1) * settings.epochs)
            record = {
                "benchmark": "train",
                "environment": environment(device, settings.seed),
                "arguments": arguments | {"n_iter": len(runs)},
                "data": _data_record(data),
                "model": description,
                "runs": runs,
                "summary": summarize(runs),
            }
            write_json(output, record)
    return record


def _runs_of(output: Path, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that a file has already; it must be one of the same arguments."""
    if not output.is_file():
        return []
    record = json.loads(output.read_text(encoding="utf-8"))
    before = {key: value for key, value in record["arguments"].items() if key != "n_iter"}
    if before != arguments:
        other = sorted(
            key for key in {*before, *arguments} if before.get(key) != arguments.get(key)
        )
        raise ArgumentError(
            f"{output} is of other arguments ({', '.join(other)}): resume with those, or name "
            "another --output"
        )
    runs: list[dict[str, Any]] = record["runs"]
    return runs


def prepare_data(settings: Settings, device: torch.device) -> Dataset:
    """The data set, as much of it as is wanted."""
    return reduced(
        load(settings.dataset, settings.data_path, device),
        images=settings.images,
        pool=settings.pool,
        validation=settings.validation,
    )


def prepare(settings: Settings, data: Dataset, seed: int) -> tuple[Trainer, dict[str, Any]]:
    """A fresh model with its optimizer, and a description of the model.

    The caller's random numbers are left as they were.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _build(settings, data).to(data.train_images.device)
        if settings.sigma or settings.balance_once:
            _rescale_(model, settings, data)
    optimizer = _optimizer(settings, model)
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    description: dict[str, Any] = {
        "weights": len(weights),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    balancer = None
    if settings.enorm:
        plan = enorm_fx.analyze(model, data.train_images[:2])
        balancer = enorm_fx.ENorm(
            plan,
            optimizer,
            c=settings.enorm,
            start=settings.start,
            last_layer=settings.last_layer,
            converge=settings.converge,
            cycles=settings.cycles,
            every=settings.every,
            order=settings.order,
        )
        description |= {
            "pairs": len(plan.pairs),
            "num_scales": plan.num_scales,
            "exact": plan.exact,
        }
    generator = torch.Generator().manual_seed(seed)
    size, amp = settings.batch_size, settings.amp
    return Trainer(model, optimizer, balancer, data, size, generator, amp), description


def _rescale_(model: nn.Module, settings: Settings, data: Dataset) -> None:
    """The same function from other weights: units rescaled at random, then balanced, as asked."""
    plan = enorm_fx.analyze(model, data.train_images[:2], batchnorm="affine")
    if settings.sigma:
        plan.rescale_(settings.sigma * torch.randn(plan.num_scales, dtype=torch.float64))
    if settings.balance_once:
        enorm_fx.balance(plan)


def _optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    rate, decay = settings.lr, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=rate, momentum=settings.momentum, weight_decay=decay, fused=True
        )
    if settings.momentum:
        raise ArgumentError("--momentum belongs to sgd: leave it out with --optimizer adamw")
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=True)


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
    shape, classes = data.train_images.shape[1:], data.classes
    if (settings.model_type == "transformer") != (data.name == "text"):
        raise ArgumentError("the transformer reads text, and the other models read images")
    width: dict[str, int] = {} if settings.width is None else {"width": settings.width}
    if settings.model_type == "transformer":
        return Transformer(len(data.train_images[0]), classes, n_layers=settings.n_layers, **width)
    if settings.model_type == "linear":
        features = shape.numel()
        return fully_connected(features, settings.n_layers, classes, norm=settings.norm, **width)
    build = {"conv": fully_convolutional, "resnet": residual, "vgg": vgg}[settings.model_type]
    return build(shape[0], classes, norm=settings.norm, **width)


def use_device(name: str) -> torch.device:
    """The device of a name; an ArgumentError where there is none."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {name} cannot be used here: {error}") from error
    return device


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


if __name__ == "__main__":
    sys.exit(main())
