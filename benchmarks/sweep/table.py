"""The tables of `benchmarks/results/sweep/`: `python -m benchmarks.sweep.table`.

A cell: mean and deviation of the seeds; the learning rate, the best on the images held out; how far
that is from the row that it is compared with, and p of a paired t test over the seeds. Runs that
failed (a number that is not finite, or a last epoch's loss above that of guessing) are counted, and
stay in the mean with the accuracy that they had. The rates and p are for one comparison each: of
twenty, one is below 0.05 by chance.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._environment import RESULTS
from benchmarks.sweep.paired import paired_p

FOLDER = RESULTS / "sweep"
PAGE = Path(__file__).parents[2] / "docs" / "results.md"
GUESSING = math.log(10)

Choices = Sequence[Mapping[str, Any]]
Wanted = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """One table of one question.

    where:   what its choices have in common. columns: by heading, what else they have.
    rows:    the ways, each with the row that it is compared with (itself: not compared).
    text:    a language model: losses in nats rather than accuracies in percent.
    """

    name: str
    question: str
    where: Wanted
    columns: Mapping[str, Wanted]
    rows: Mapping[str, str]
    text: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """One way in one column at its best learning rate: a figure for each seed."""

    rate: float
    figures: tuple[float, ...]
    failed: int


def _against(reference: str, *ways: str) -> dict[str, str]:
    return dict.fromkeys((reference, *ways), reference)


_SIGMAS = {f"sigma {sigma:g}": {"sigma": sigma} for sigma in (0.0, 0.5, 1.0, 2.0)}
_USUAL = ("balanced once", "ENorm", "ENorm, last_layer")
TABLES = [
    Table("SGD with momentum", "scaled_start", {"optimizer": "sgd"}, _SIGMAS,
          _against("alone", *_USUAL, "ENorm, last_layer, converge")),
    Table("AdamW", "scaled_start", {"optimizer": "adamw"}, _SIGMAS, _against("alone", *_USUAL)),
    Table(
        "settings", "settings", {},
        {
            "fully connected, sigma 0": {"dataset": "fashion-mnist", "sigma": 0.0},
            "fully connected, sigma 1": {"dataset": "fashion-mnist", "sigma": 1.0},
            "residual, digits, sigma 1": {"dataset": "digits", "sigma": 1.0},
        },
        {
            **_against(
                "defaults", "no ENorm", "start as_is", "c = 1.2", "cycles = 5", "every = 10",
                "order = colored", "order = simultaneous", "last_layer",
            ),
            **dict.fromkeys(
                (
                    "last_layer, start as_is", "last_layer, c = 0.9", "last_layer, c = 1.2",
                    "last_layer, cycles = 5", "last_layer, every = 10",
                ),
                "last_layer",
            ),
        },
    ),
    Table("residual start", "residual_start", {},
          {f"sigma {sigma:g}": {"sigma": sigma} for sigma in (0.0, 1.0, 2.0)},
          _against("alone", *_USUAL)),
    Table(
        "batches", "small_batches", {}, {f"{n} images": {"batch_size": n} for n in (2, 4, 16, 64)},
        _against("none", "BatchNorm", "GroupNorm", "ENorm", "ENorm, last_layer"),
    ),
    Table(
        "depth", "depth", {}, {f"{n} layers": {"n_layers": n} for n in (3, 8, 15)},
        {
            f"{norm}, {way}": f"{norm}, no ENorm"
            for norm in ("BatchNorm", "no BatchNorm")
            for way in ("no ENorm", "ENorm c = 1", "ENorm c = 1.2")
        },
    ),
    Table("residual", "residual", {}, {"test accuracy": {}},
          _against("alone", *_USUAL, "BatchNorm", "GroupNorm")),
    Table("transformer", "transformer", {}, {"test loss, nats a byte": {}},
          _against("alone", *_USUAL), text=True),
]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or put them into the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep.table", description=__doc__)
    parser.add_argument("--update", action="store_true", help="renew those of docs/results.md")
    if parser.parse_args(arguments).update:
        PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        for name, text in rendered().items():
            print(f"{name}\n\n{text}\n")
    return 0


def rendered(folder: Path = FOLDER) -> dict[str, str]:
    """By name, every table that two seeds or more are there for."""
    records = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    found = {
        table.name: render(table, records[table.question])
        for table in TABLES
        if table.question in records and len(seeds(records[table.question])) > 1
    }
    if "batches" in found:
        found["cost"] = cost(records["small_batches"])
    if "along" in records:
        found["along"] = along(records["along"])
    return found


def updated(text: str) -> str:
    """A page whose tables, each after a comment with its name, are those of the files."""
    for name, table in rendered().items():
        start = f"<!-- table: {name} -->\n"
        before, found, after = text.partition(start)
        if found:
            _, end, rest = after.partition("\n\n")
            text = before + start + table + end + rest
    return text


def read(path: Path) -> dict[str, Any]:
    """A file of the sweep."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def seeds(record: Mapping[str, Any]) -> list[int]:
    """The seeds that every choice has: only they are compared."""
    found = [set(line["seeds"]) for line in record["choices"]]
    return sorted(set.intersection(*found)) if found else []


def best(table: Table, record: Mapping[str, Any], way: str, column: Wanted) -> Cell | None:
    """The way at the learning rate that is best on what was held out; None if it was not run."""
    wanted = {**table.where, **column, "way": way}
    lines = [
        line
        for line in record["choices"]
        if all(line["choice"].get(name) == value for name, value in wanted.items())
    ]
    if not lines:
        return None
    common = seeds(record)
    line = max(lines, key=lambda line: _held_out(line, common, table.text))
    figures = _at(line, "test_loss" if table.text else "test_accuracy", common)
    losses = _at(line, "train_loss", common)
    limit = math.inf if table.text else GUESSING
    factor = 1 if table.text else 100
    return Cell(
        rate=line["choice"]["lr"],
        figures=tuple(factor * figure for figure in figures),
        failed=sum(not loss <= limit for loss in losses),
    )


def _held_out(line: Mapping[str, Any], common: Sequence[int], text: bool) -> float:
    if text:
        return -statistics.mean(_at(line, "validation_loss", common))
    return statistics.mean(_at(line, "validation_accuracy", common))


def _at(line: Mapping[str, Any], name: str, common: Sequence[int]) -> list[float]:
    """The figures of some seeds; infinite where one was not finite."""
    found = dict(zip(line["seeds"], line[name], strict=True))
    return [math.inf if found[seed] is None else found[seed] for seed in common]


def render(table: Table, record: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    lines = [
        "| | " + " | ".join(table.columns) + " |",
        "| --- |" + " ---: |" * len(table.columns),
    ]
    for way, reference in table.rows.items():
        cells = []
        for column in table.columns.values():
            cell = best(table, record, way, column)
            other = best(table, record, reference, column) if reference != way else None
            cells.append("" if cell is None else _text(cell, other, table.text))
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _text(cell: Cell, other: Cell | None, text: bool) -> str:
    digits = 3 if text else 1
    mean = statistics.mean(cell.figures)
    shown = f"{mean:.{digits}f} ± {statistics.stdev(cell.figures):.{digits}f} at {cell.rate:g}"
    if cell.failed:
        shown += f", {cell.failed} of {len(cell.figures)} fail"
    if other is not None:
        apart = mean - statistics.mean(other.figures)
        p = paired_p(cell.figures, other.figures)
        shown += f"; {apart:+.{digits}f}, " + ("p < 0.001" if p < 0.0005 else f"p {p:.3f}")
    return shown


def cost(record: Mapping[str, Any]) -> str:
    """Seconds an epoch beside those without normalization, in the same sweep; and ENorm's share."""
    common = seeds(record)
    sizes = list(dict.fromkeys(line["choice"]["batch_size"] for line in record["choices"]))
    ways = list(dict.fromkeys(line["choice"]["way"] for line in record["choices"]))
    lines = ["| | " + " | ".join(f"{size} images" for size in sizes) + " |"]
    lines.append("| --- |" + " ---: |" * len(sizes))
    for way in ways:
        cells = []
        for size in sizes:
            ratio = _seconds(record, way, size, common) / _seconds(record, "none", size, common)
            cells.append(f"{ratio:.2f}")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _seconds(record: Mapping[str, Any], way: str, size: int, common: Sequence[int]) -> float:
    """The median over seeds and learning rates: other programs run beside these."""
    return statistics.median(
        second
        for line in record["choices"]
        if line["choice"]["way"] == way and line["choice"]["batch_size"] == size
        for second in _at(line, "seconds_per_epoch", common)
    )


def along(record: Mapping[str, Any]) -> str:
    """By optimizer, way and step: J above its least, and |log d| before and after ENorm's step.

    Means over the seeds; the figures of "alone", where nothing happens between, stand once.
    """
    lines = ["| | " + " | ".join(f"step {step}" for step in record["steps"]) + " |"]
    lines.append("| --- |" + " ---: |" * len(record["steps"]))
    names = {"sgd": "SGD", "adamw": "AdamW"}
    heads = dict.fromkeys((r["choice"]["optimizer"], r["choice"]["way"]) for r in record["runs"])
    for optimizer, way in heads:
        cells = []
        for place in range(len(record["steps"])):
            excess = _along(record, (optimizer, way), place, "before", "excess")
            before = _along(record, (optimizer, way), place, "before", "largest_log_scale")
            after = _along(record, (optimizer, way), place, "after", "largest_log_scale")
            moved = f"{before:.4f}" if way == "alone" else f"{before:.4f} → {after:.4f}"
            cells.append(f"{excess:.2%}; {moved}")
        lines.append(f"| {names[optimizer]}, {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _along(
    record: Mapping[str, Any], head: tuple[str, str], place: int, when: str, measure: str
) -> float:
    found: list[float] = [
        run["steps"][place][when][measure]
        for run in record["runs"]
        if (run["choice"]["optimizer"], run["choice"]["way"]) == head
    ]
    return statistics.mean(found)


if __name__ == "__main__":
    sys.exit(main())
