"""Train what the questions ask for; stopped at any time, the same command goes on.

    python -m benchmarks.sweep scaled_start settings --data fashion-mnist=FOLDER --minutes 30
    python -m benchmarks.sweep paper --data cifar10=FOLDER --device cuda

What is trained is in `benchmarks/sweep/questions.py`. Seeds come one after the other, each through
the whole question, so that what is compared runs close together. One JSON file a question, in
benchmarks/results/sweep/; `python -m benchmarks.sweep.table` makes the tables.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks._environment import RESULTS, environment
from benchmarks._settings import Settings, parse_arguments
from benchmarks._training import train
from benchmarks.data import Dataset
from benchmarks.sweep.questions import QUESTIONS, Choice
from benchmarks.sweep.store import Store, key
from benchmarks.train import prepare, prepare_data, use_device
from enorm_fx.errors import ArgumentError, EnormError

_SECONDS_BETWEEN_WRITES = 10.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how everything runs: the device, the files, and options that all runs take."""

    device: str
    paths: Mapping[str, Path]
    options: Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing of each question; returns the exit status."""
    options = _parse(arguments)
    console = Console()
    end = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(1)
    try:
        place = Place(options.device, _paths(options.data), _options(options.set))
        device = use_device(options.device)
        for question in options.questions:
            choices = QUESTIONS[question]
            path = options.output / f"{question}.json"
            store = Store(path, question, choices, environment(device, 0), place.options)
            missing = [
                (choice, seed)
                for seed in range(options.seeds)
                for choice in choices
                if (key(choice), seed) not in store.runs
            ]
            _run(store, missing, place, options.processes, end, console)
            console.print(f"written: {path}", markup=False)
    except (EnormError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False)
        return 2
    return 0


def _run(
    store: Store,
    missing: Sequence[tuple[Choice, int]],
    place: Place,
    processes: int,
    end: float,
    console: Console,
) -> None:
    """Train until all is there or time is up; what is done is written whatever stops it."""
    written, done = time.monotonic(), 0
    try:
        for choice, seed, figures in _figures(missing, place, processes, end):
            store.runs[key(choice), seed] = figures
            done += 1
            if time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
                store.write()
                written = time.monotonic()
                console.print(f"{store.question}: {done} of {len(missing)} runs", markup=False)
    finally:
        store.write()
    console.print(f"{store.question}: {done} of {len(missing)} runs", markup=False)


def _figures(
    missing: Sequence[tuple[Choice, int]], place: Place, processes: int, end: float
) -> Iterator[tuple[Choice, int, dict[str, float | None]]]:
    """Figures as they come; none is begun after `end`."""
    if processes == 1:
        for choice, seed in missing:
            if time.monotonic() > end:
                return
            yield choice, seed, run(choice, seed, place)
        return
    rest = iter(missing)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        begun = {pool.submit(run, *job, place): job for job in islice(rest, processes)}
        while begun:
            for future in wait(begun, return_when=FIRST_COMPLETED).done:
                yield *begun.pop(future), future.result()
                if time.monotonic() < end:
                    begun |= {pool.submit(run, *job, place): job for job in islice(rest, 1)}


def run(choice: Choice, seed: int, place: Place) -> dict[str, float | None]:
    """One training: the figures of its last epoch, None where one is not finite or not taken."""
    torch.set_num_threads(1)
    settings = as_settings(choice, place)
    trainer, _ = prepare(settings, _data(replace(settings, **_NOT_OF_DATA)), seed)
    epochs = list(train(trainer, settings.lr, settings.epochs))
    last = epochs[-1]
    seconds = sum(epoch.seconds for epoch in epochs)
    share = sum(epoch.seconds * epoch.enorm_share for epoch in epochs) / seconds
    figures = {
        "validation_accuracy": last.validation_accuracy,
        "validation_loss": last.validation_loss,
        "test_accuracy": last.test_accuracy,
        "test_loss": last.test_loss,
        "train_loss": last.train_loss,
        "weight_norm": last.weight_norm,
        "seconds_per_epoch": seconds / len(epochs),
        "enorm_share": share,
    }
    return {name: _short(value) for name, value in figures.items()}


def as_settings(choice: Choice, place: Place) -> Settings:
    """The options of `benchmarks.train` that a choice stands for."""
    options = {name: value for name, value in choice.items() if name != "way"}
    path = place.paths.get(choice["dataset"])
    settings = replace(parse_arguments([]), **options, data_path=path, device=place.device)
    return replace(settings, **place.options)


# Settings differ from run to run, and most of them do not matter for the data set.
_OF_DATA = ("dataset", "data_path", "images", "pool", "validation", "device")
_NOT_OF_DATA: dict[str, Any] = {
    name: getattr(parse_arguments([]), name) for name in Settings.__slots__ if name not in _OF_DATA
}


@lru_cache(maxsize=4)
def _data(settings: Settings) -> Dataset:
    return prepare_data(settings, torch.device(settings.device))


def _short(value: float | None) -> float | None:
    """Five digits: the files are read by people and kept in the repository."""
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return None
    return float(f"{value:.5g}")


def _paths(words: Sequence[str]) -> dict[str, Path]:
    for word in words:
        if not word.partition("=")[2]:
            raise ArgumentError(f"--data {word}: write NAME=PATH, such as cifar10=FOLDER")
    return {name: Path(path) for name, _, path in (word.partition("=") for word in words)}


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Options of `benchmarks.train`, read as its command line reads them."""
    parts = [word.partition("=") for word in words]
    settings = parse_arguments([f"--{name.replace('_', '-')}={value}" for name, _, value in parts])
    return {name: getattr(settings, name) for name, _, _ in parts}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("questions", nargs="+", choices=QUESTIONS, metavar="QUESTION", help=", ".join(QUESTIONS))
    add("--data", action="append", default=[], metavar="NAME=PATH", help="files of a data set")
    add("--seeds", type=int, default=5)
    add("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="of train, for every run")
    add("--device", default="cpu")
    add("--processes", type=int, default=1, help="runs at once, each on one thread")
    add("--minutes", type=float, default=float("inf"), help="begin no run after that")
    add("--output", type=Path, default=RESULTS / "sweep", metavar="FOLDER")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
