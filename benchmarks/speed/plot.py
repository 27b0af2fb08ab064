"""The picture of `python -m benchmarks.speed`. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.speed.report import TITLES, contenders

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart by colour-blind readers.
COLOURS = {
    "native": "#0072B2",
    "eager": "#56B4E9",
    "cudagraph": "#CC79A7",
    "loop": "#D55E00",
    "flat": "#BBBBBB",
}
_ORDER = ("flat", "cudagraph", "native", "eager", "loop")
_ADDS = (("enorm", "ENorm", "#0072B2"), ("batch", "BatchNorm", "#E69F00"),
         ("group", "GroupNorm", "#999999"))  # fmt: skip


def draw(path: Path, record: Mapping[str, Any]) -> None:
    """Steps as multiples of the fused SGD step and, if measured, what a training step gains."""
    # A Figure of its own draws with Agg and leaves pyplot's global state alone.
    from matplotlib.figure import Figure

    training = record.get("training")
    figure = Figure(figsize=(11, 7.6 if training else 4.2), layout="constrained")
    if training:
        upper, lower = figure.subplots(2, 1, height_ratios=(1.25, 1))
        _draw_training(lower, training)
    else:
        upper = figure.subplots()
    _draw_steps(upper, record["step"])
    environment = record["environment"]
    count = environment["threads"]
    threads = f", {count} thread{'s' * (count > 1)}" if environment["device"] == "cpu" else ""
    figure.suptitle(f"{environment['device_name']}{threads}, torch {environment['torch']}")
    figure.savefig(path, dpi=120)


def _draw_steps(axes: Axes, step: Mapping[str, Any]) -> None:
    present = contenders(step)
    names = [name for name in _ORDER if name in present]
    width = 0.84 / len(names)
    for number, name in enumerate(names):
        shift = (number - (len(names) - 1) / 2) * width
        found = [(k, r["ratios"][name]) for k, r in enumerate(step.values()) if name in r["ratios"]]
        title = "floor: the bare passes over the data" if name == "flat" else TITLES[name]
        marks = axes.bar(
            [k + shift for k, _ in found], [ratio - 1 for _, ratio in found], width * 0.94,
            bottom=1, color=COLOURS[name], label=title, zorder=2,
        )  # fmt: skip
        axes.bar_label(marks, [_short(ratio) for _, ratio in found], fontsize=8, padding=2)
    axes.axhline(1, color="black", linewidth=1, zorder=3)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    low, top = axes.get_ylim()
    axes.set_ylim(low / 1.3, top * 3)  # room for labels and legend
    axes.set_ylabel("multiples of a fused SGD step")
    axes.set_title("One ENorm step, momentum following (median; line: one fused SGD step)")
    _finish(axes, list(step))


def _draw_training(axes: Axes, training: Mapping[str, Any]) -> None:
    """Bars in percent of the training step without normalization."""
    width = 0.84 / len(_ADDS)
    for number, (key, title, colour) in enumerate(_ADDS):
        shift = (number - 1) * width
        rows = [row["adds_share_of_base"] for row in training.values()]
        found = [(k + shift, 100 * row[key]) for k, row in enumerate(rows) if key in row]
        marks = axes.bar(
            [place for place, _ in found], [share for _, share in found], width * 0.94,
            color=colour, label=title, zorder=2,
        )  # fmt: skip
        axes.bar_label(marks, [f"{_short(share)}%" for _, share in found], fontsize=8, padding=2)
    # From a tenth of a percent to several steps; noise may fall below zero.
    axes.set_yscale("symlog", linthresh=1)
    low, top = axes.get_ylim()
    axes.set_ylim(min(0, low * 1.5), top * 8)
    axes.axhline(0, color="black", linewidth=0.8, zorder=3)
    axes.yaxis.set_major_formatter("{x:g}%")
    axes.set_ylabel("time added")
    axes.set_title("What each adds to a training step of the same network")
    batches = [" x ".join(map(str, row["batch"])) for row in training.values()]
    _finish(axes, [f"{name}\n{batch}" for name, batch in zip(training, batches, strict=True)])


def _short(value: float) -> str:
    """Two digits, without powers of ten."""
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def _finish(axes: Axes, labels: list[str]) -> None:
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.grid(axis="y", alpha=0.3, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=6, loc="upper left", fontsize=9, columnspacing=1.2)
