"""The picture of `python -m benchmarks.balance`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers.
_COLOURS = {"plain": "#D55E00", "corrected": "#0072B2"}
_MARKERS = {"plain": "", "corrected": "."}
_STYLES: dict[str, Literal["-", "--"]] = {"objective_gap": "-", "imbalance": "--"}
_LABELS = {"objective_gap": "$(J - J^*)\\,/\\,J^*$", "imbalance": "imbalance"}
_COLUMNS = 3
_FLOOR = 1e-15  # rounding: smaller figures, and 0, are drawn here


def draw(path: Path, record: Mapping[str, Any]) -> None:
    """Write a PNG: both gaps by cycle, a panel a network. record: what lies in the JSON.

    The words in a panel count the cycles until J's gap is at most the tolerance, a grey line.
    """
    # A Figure of its own draws with Agg and leaves pyplot's global state alone.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    networks = record["networks"]
    columns = min(_COLUMNS, len(networks))
    rows = math.ceil(len(networks) / columns)
    figure = Figure(figsize=(3.8 * columns, 2.7 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for number, axes in enumerate(panels.flat):
        if number < len(networks):
            name = list(networks)[number]
            _draw_network(axes, name, networks[name], record)
        else:
            axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set_ylabel("gap")
    for number in range(max(0, len(networks) - columns), len(networks)):
        panels.flat[number].set_xlabel("cycles")
        panels.flat[number].tick_params(labelbottom=True)
    handles = [
        Line2D([], [], color=colour, linestyle=style, label=f"{run}, {_LABELS[key]}")
        for run, colour in _COLOURS.items()
        for key, style in _STYLES.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """A palette of 64 colours is enough for a few lines, and a third of the file."""
    from PIL import Image  # matplotlib brings it

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    Image.open(buffer).convert("RGB").quantize(64).save(path, format="png", optimize=True)


def _draw_network(axes: Axes, name: str, row: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    for run in ("plain", "corrected"):
        for figure, style in _STYLES.items():
            values = [max(_FLOOR, value) for value in row[run][figure]]
            width = 2.0 if figure == "objective_gap" else 1.2
            axes.plot(
                range(len(values)), values, color=_COLOURS[run], linestyle=style,
                linewidth=width, marker=_MARKERS[run], markersize=5,
            )  # fmt: skip
    axes.axhline(record["tolerance"], color="#999999", linewidth=0.8, zorder=0)
    # Linear up to the first cycle, so that the start is there too.
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    axes.xaxis.set_major_locator(FixedLocator([0, 1, 3, 10, 30, 100, 300]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(-0.15, 1.4 * record["most_cycles"])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([1e-15, 1e-10, 1e-5, 1, 1e5]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(_FLOOR / 5, 3e8)
    axes.grid(alpha=0.25)
    axes.set_title(f"{name}, {row['groups']} groups", fontsize=10)
    # No curve comes near the upper right corner: after one cycle J is within a few times J*.
    for line, run in enumerate(("plain", "corrected")):
        axes.text(
            0.97, 0.95 - 0.11 * line, f"{run}: {in_words(row[run])}", color=_COLOURS[run],
            transform=axes.transAxes, ha="right", va="top", fontsize=9,
        )  # fmt: skip


def in_words(run: Mapping[str, Any]) -> str:
    """How many cycles J took: '5 cycles', or 'more than 300' where a limit came first."""
    found = run["cycles_to_objective_gap"]
    if found is None:
        return f"more than {len(run['objective_gap']) - 1} cycles"
    return f"{found} cycle{'' if found == 1 else 's'}"
