"""Does training survive badly scaled units? `python -m benchmarks.scaled_start`.

Each unit of a network is rescaled by e^x, x normal with standard deviation 2: the same function.
Then it is trained by SGD with momentum, plain and with ENorm in several ways; beside it the
balanced network, by plain SGD. Two data sets, three networks, five seeds; a run counts as diverged
if a number is not finite, or the mean loss of its last epoch is above that of guessing, ln 10.
Prints a table and writes scaled_start.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import enorm_fx
from benchmarks._environment import RESULTS, environment, write_json
from benchmarks._training import batches, evaluate
from benchmarks.data import Dataset, load
from enorm_fx.demo.training import DigitReader
from enorm_fx.errors import NonFiniteError

SIGMA = 2.0
LEARNING_RATE, MOMENTUM, BATCH = 0.05, 0.9, 64
GUESSING = math.log(10)

# None: the balanced network, without ENorm. Else the scaled one, and the settings of ENorm.
WAYS: dict[str, dict[str, Any] | None] = {
    "balanced network, SGD": None,
    "SGD": {},
    "ENorm": {"start": "balanced", "last_layer": False},
    "ENorm, last_layer": {"start": "balanced", "last_layer": True},
    "ENorm, last_layer, as_is": {"start": "as_is", "last_layer": True},
}


def mlp(features: int) -> nn.Module:
    """Four linear layers of width 64."""
    widths = [features, 64, 64, 64]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def convolutional() -> nn.Module:
    """Four convolutions, the mean over positions, a linear layer."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((1, 16), (16, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.ReLU()]
        if fan_in == fan_out == 16:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


NETWORKS: dict[str, Callable[[Dataset], nn.Module]] = {
    "MLP": lambda data: mlp(data.train_images[0].numel()),
    "convolutional": lambda _: convolutional(),
    "residual": lambda _: DigitReader(),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaled_start", description=__doc__)
    add = parser.add_argument
    add("--datasets", nargs="+", default=["digits", "fashion-mnist"])
    add("--data-path", type=Path, help="folder of Fashion-MNIST's files")
    add("--images", type=int, default=512, help="training images of Fashion-MNIST, at half size")
    add("--epochs", type=int, default=5)
    add("--seeds", type=int, default=5)
    add("--processes", type=int, default=1, help="cells of the table that are made at once")
    add("--output", type=Path, default=RESULTS / "scaled_start.json")
    options = parser.parse_args(argv)
    cells = [(d, n, options) for d in options.datasets for n in NETWORKS]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        parts = list(pool.map(cell, cells))
    runs = [figures for found, _ in parts for figures in found]
    summary = summarize(runs)
    record = {
        "benchmark": "scaled_start",
        "environment": environment(torch.device("cpu"), 0),
        "settings": {
            "sigma": SIGMA,
            "learning_rate": LEARNING_RATE,
            "momentum": MOMENTUM,
            "batch": BATCH,
            "epochs": options.epochs,
            "seeds": options.seeds,
            "images": options.images,
            "ways": WAYS,
        },
        "cpu_seconds": sum(seconds for _, seconds in parts),
        "summary": summary,
        "runs": runs,
    }
    write_json(options.output, record)
    show(Console(), summary)
    return 0


def cell(job: tuple[str, str, argparse.Namespace]) -> tuple[list[dict[str, Any]], float]:
    """Every way and seed of one network on one data set, and the seconds of the processor."""
    dataset, network, options = job
    torch.set_num_threads(1)
    started = time.process_time()
    data = smaller(load(dataset, options.data_path, torch.device("cpu")), options.images)
    found = [
        {"dataset": dataset, "network": network, "way": way, "seed": seed}
        | run(network, data, WAYS[way], seed, options.epochs)
        for way in WAYS
        for seed in range(options.seeds)
    ]
    return found, time.process_time() - started


def smaller(data: Dataset, images: int) -> Dataset:
    """Images of more than 8 x 8 at half size, and only the first of them; as many to test on."""
    if data.train_images.shape[-1] <= 8:
        return data
    return replace(
        data,
        train_images=F.avg_pool2d(data.train_images[:images], 2),
        train_labels=data.train_labels[:images],
        test_images=F.avg_pool2d(data.test_images[:images], 2),
        test_labels=data.test_labels[:images],
    )


def run(
    network: str, data: Dataset, settings: dict[str, Any] | None, seed: int, epochs: int
) -> dict[str, Any]:
    """One training: did it diverge, the mean loss of the last epoch, accuracy on the test images.

    The caller's random numbers are left as they were.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[network](data)
        plan = enorm_fx.analyze(model, data.train_images[:2])
        scales = SIGMA * torch.randn(plan.num_scales, dtype=torch.float64)
    if settings is None:
        enorm_fx.balance(plan)
    else:
        plan.rescale_(scales)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    enorm = enorm_fx.ENorm(plan, optimizer, **settings) if settings else None
    generator = torch.Generator().manual_seed(seed)
    loss = math.nan
    for _ in range(epochs):
        loss = epoch(model, data, optimizer, enorm, generator)
        if not math.isfinite(loss):
            break
    accuracy = evaluate(model, data)[1]
    return {"diverged": not loss <= GUESSING, "train_loss": loss, "test_accuracy": accuracy}


def epoch(
    model: nn.Module,
    data: Dataset,
    optimizer: torch.optim.Optimizer,
    enorm: enorm_fx.ENorm | None,
    generator: torch.Generator,
) -> float:
    """One pass over the training images: their mean loss, NaN as soon as one is not finite."""
    model.train()
    order = torch.randperm(len(data.train_labels), generator=generator)
    losses = []
    for batch in batches(order, BATCH):
        loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return math.nan
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        try:
            optimizer.step()
            if enorm is not None:
                enorm.step()
        except NonFiniteError:
            return math.nan
    return statistics.mean(losses)


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By data set, network and way: runs, how many diverged, mean accuracy of all."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for one in runs:
        groups.setdefault((one["dataset"], one["network"], one["way"]), []).append(one)
    return [
        {
            "dataset": dataset,
            "network": network,
            "way": way,
            "runs": len(members),
            "diverged": sum(member["diverged"] for member in members),
            "test_accuracy": statistics.mean(member["test_accuracy"] for member in members),
        }
        for (dataset, network, way), members in groups.items()
    ]


def show(console: Console, summary: Sequence[dict[str, Any]]) -> None:
    """The table, in Markdown: a row for each way, a column for each data set and network."""
    rows: dict[str, list[str]] = {}
    heads: list[str] = []
    for entry in summary:
        head = f"{entry['dataset']}, {entry['network']}"
        if head not in heads:
            heads.append(head)
        text = f"{entry['test_accuracy']:.1%}"
        if entry["diverged"]:
            text = f"{entry['diverged']} of {entry['runs']} diverge"
        rows.setdefault(entry["way"], []).append(text)
    table = Table("", *heads, title="test accuracy, mean of the seeds")
    for way, cells in rows.items():
        table.add_row(way, *cells)
    console.print(table)
    print("| |", " | ".join(heads), "|")
    print("| --- |", " | ".join(["---:"] * len(heads)), "|")
    for way, cells in rows.items():
        print(f"| {way} |", " | ".join(cells), "|")


if __name__ == "__main__":
    sys.exit(main())
