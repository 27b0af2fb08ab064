"""Pictures of the sweep: `python -m benchmarks.sweep.plot`, beside the JSON files.

scaled_start.png: test accuracy by how badly the units are scaled at the start. Needs matplotlib.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.sweep.table import FOLDER, TABLES, Table, best, read
from benchmarks.train_summary import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def main() -> int:
    """Draw what has figures."""
    draw(FOLDER / "scaled_start.png", read(FOLDER / "scaled_start.json"))
    return 0


def draw(path: Path, record: Mapping[str, Any]) -> None:
    """A panel for each optimizer, a line for each way: mean and deviation over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    tables = [table for table in TABLES if table.question == "scaled_start"]
    for axes, table in zip(panels, tables, strict=True):
        _panel(axes, table, record)
    panels[0].set_ylabel("test accuracy, percent")
    panels[0].legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, table: Table, record: Mapping[str, Any]) -> None:
    for place, way in enumerate(table.rows):
        sigmas, means, deviations = [], [], []
        for column in table.columns.values():
            cell = best(table, record, way, column)
            if cell is not None:
                # Apart by a little, so that error bars do not hide one another.
                sigmas.append(column["sigma"] + 0.02 * (place - 1.5))
                means.append(statistics.mean(cell.figures))
                deviations.append(statistics.stdev(cell.figures))
        if len(sigmas) == len(table.columns):
            axes.errorbar(
                sigmas, means, deviations, label=way, color=COLOURS[place], marker="o", capsize=3
            )
    axes.set_title(table.name)
    axes.set_xlabel("sigma: units rescaled by e^N(0, sigma) at the start")
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(main())
