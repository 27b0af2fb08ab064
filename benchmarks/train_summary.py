"""Put the results of `python -m benchmarks.train` side by side.

    python -m benchmarks.train_summary [FILE ...] [--plot PICTURE]

Prints a markdown table, one line a file, and draws training loss and test accuracy by epoch.
Without files: every train-*.json under benchmarks/results/. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._environment import RESULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADINGS = (
    "data set",
    "model",
    "norm",
    "lr",
    "ENorm c",
    "epochs",
    "test accuracy",
    "training loss",
    "weight norm",
    "s / epoch",
    "of it ENorm",
    "runs",
    "diverged",
)
# Okabe and Ito's palette, told apart by colour-blind readers.
COLOURS = ("#D55E00", "#0072B2", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#000000")
STYLES = ("-", "--", "-.", ":")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, draw the plot if asked to; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_summary", description="Put training results side by side."
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="PICTURE")
    options = parser.parse_args(arguments)
    files = options.files or sorted(RESULTS.glob("train-*.json"))
    if not files:
        print(f"error: no results: name files, or put some into {RESULTS}", file=sys.stderr)
        return 2
    try:
        records = [read(path) for path in files]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(records))
    if options.plot is not None:
        draw(options.plot, records)
    return 0


def read(path: Path) -> dict[str, Any]:
    """Read one result file."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("benchmark") != "train":
        raise ValueError(f"{path} is no result of benchmarks.train")
    return record


def table(records: Sequence[dict[str, Any]]) -> str:
    """A markdown table, one line a record."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *map(_row, records)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Loss and accuracy by epoch: the mean over runs, and a band from the least to the most."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for number, record in enumerate(records):
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number % len(STYLES)]
        for axes, key in ((loss, "train_loss"), (accuracy, "test_accuracy")):
            _draw_curve(axes, record, key, colour, style)
    loss.set_yscale("log")
    loss.set_ylabel("training loss, mean cross-entropy (nats)")
    accuracy.set_ylabel("test accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    accuracy.legend(frameon=False)
    figure.suptitle(" / ".join(sorted({_subject(record) for record in records})))
    figure.savefig(path, dpi=150)


def _draw_curve(axes: Axes, record: dict[str, Any], key: str, colour: str, style: str) -> None:
    """Epochs that some run did not finish with a finite figure are left out."""
    columns: list[list[float | None]] = [
        [run["epochs"][epoch][key] for run in record["runs"] if epoch < len(run["epochs"])]
        for epoch in range(record["arguments"]["epochs"])
    ]
    finite = {
        epoch: [value for value in values if value is not None]
        for epoch, values in enumerate(columns, start=1)
    }
    whole = {
        epoch: values for epoch, values in finite.items() if len(values) == len(record["runs"])
    }
    epochs = list(whole)
    label = _configuration(record)
    if len(epochs) < len(columns):
        label += f" ({record['summary']['diverged']} of {len(record['runs'])} runs diverged)"
    means = [statistics.mean(values) for values in whole.values()]
    axes.plot(epochs, means, style, color=colour, label=label, linewidth=2, marker=".")
    lows, highs = map(min, whole.values()), map(max, whole.values())
    axes.fill_between(epochs, list(lows), list(highs), color=colour, alpha=0.15, linewidth=0)


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    options, summary = record["arguments"], record["summary"]
    accuracy = _format(summary["final_accuracy_mean"], ".2%")
    if summary["final_accuracy_std"] is not None:
        accuracy += f" ± {summary['final_accuracy_std']:.2%}"
    return (
        options["dataset"],
        _model(options),
        options["norm"],
        f"{options['lr']:g}",
        f"{options['enorm']:g}" if options["enorm"] else "off",
        str(options["epochs"]),
        accuracy,
        _format(summary["final_train_loss_mean"], ".4f"),
        _format(summary["final_weight_norm_mean"], ".1f"),
        _format(summary["seconds_per_epoch_median"], ".1f"),
        _format(summary["enorm_share_median"], ".1%"),
        str(summary["runs"]),
        str(summary["diverged"]),
    )


def _format(value: float | None, specification: str) -> str:
    """A figure that was not finite lies in the file as null."""
    return "not finite" if value is None else format(value, specification)


def _model(options: dict[str, Any]) -> str:
    model: str = options["model_type"]
    return f"linear, {options['n_layers']}" if model == "linear" else model


def _subject(record: dict[str, Any]) -> str:
    options = record["arguments"]
    names = {
        "linear": f"fully connected, {options['n_layers']} intermediary layers",
        "conv": "fully convolutional",
        "resnet": "residual",
    }
    model = names.get(options["model_type"], options["model_type"])
    return f"{options['dataset']}, {model}"


def _configuration(record: dict[str, Any]) -> str:
    options = record["arguments"]
    enorm = f"ENorm c={options['enorm']:g}" if options["enorm"] else "no ENorm"
    norm = {"bn": "BatchNorm", "gn": "GroupNorm", "none": "no BatchNorm"}[options["norm"]]
    return f"{enorm}, {norm}, lr {options['lr']:g}"


if __name__ == "__main__":
    sys.exit(main())
