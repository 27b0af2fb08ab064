"""The picture of `python -m benchmarks.speed.fused`. Needs matplotlib.

    python -m benchmarks.speed.fused_plot

draws it anew from the committed JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._environment import RESULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart by colour-blind readers.
_SHOWN = {
    "unfused": ("then ENorm", "#999999"),
    "fused": ("fused", "#0072B2"),
    "alternating": ("fused, alternating", "#56B4E9"),
}


def draw(path: Path, record: Mapping[str, Any]) -> None:
    """For each optimizer steps as multiples of its own: median and range of the visits."""
    # A Figure of its own draws with Agg and leaves pyplot's global state alone.
    from matplotlib.figure import Figure

    networks: Mapping[str, Any] = record["networks"]
    optimizers = list(next(iter(networks.values())))
    figure = Figure(figsize=(11, 3.6 * len(optimizers)), layout="constrained")
    rows = figure.subplots(len(optimizers), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(rows, optimizers, strict=True):
        _draw_optimizer(axes, name, {network: by[name] for network, by in networks.items()})
    rows[0].legend(frameon=False, ncols=4, loc="upper left", fontsize=9)
    environment = record["environment"]
    count = environment["threads"]
    threads = f", {count} thread{'s' * (count > 1)}" if environment["device"] == "cpu" else ""
    figure.suptitle(f"{environment['device_name']}{threads}, torch {environment['torch']}")
    figure.savefig(path, dpi=120)


def _draw_optimizer(axes: Axes, name: str, rows: Mapping[str, Any]) -> None:
    width = 0.84 / len(_SHOWN)
    for number, (key, (title, colour)) in enumerate(_SHOWN.items()):
        shift = (number - (len(_SHOWN) - 1) / 2) * width
        places = [k + shift for k in range(len(rows))]
        medians = [row["ratios"][key] for row in rows.values()]
        visits = [[visit[key] for visit in row["ratios_by_visit"]] for row in rows.values()]
        ends = [
            [m - min(v) for m, v in zip(medians, visits, strict=True)],
            [max(v) - m for m, v in zip(medians, visits, strict=True)],
        ]
        marks = axes.bar(
            places, medians, width * 0.94, yerr=ends, color=colour, label=title, zorder=2,
            error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
        )  # fmt: skip
        axes.bar_label(marks, [f"{m:.2f}" for m in medians], fontsize=8, padding=2)
        floors = [row["floors"][key] for row in rows.values()]
        low, high = ([place + side * width * 0.47 for place in places] for side in (-1, 1))
        label = "floor in bytes" if number == len(_SHOWN) - 1 else ""
        axes.hlines(floors, low, high, color="#D55E00", linewidth=1.6, zorder=3, label=label)
    axes.axhline(1, color="black", linewidth=1, zorder=3)
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend
    axes.set_ylabel(f"multiples of {name}'s step")
    axes.set_title(f"{name}: one step (median and range of the visits; line: {name} alone)")
    axes.set_xticks(range(len(rows)), list(rows))
    axes.grid(axis="y", alpha=0.3, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> int:
    """Draw the committed figures."""
    record = json.loads((RESULTS / "speed_fused.json").read_text(encoding="utf-8"))
    draw(RESULTS / "speed_fused.png", record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
