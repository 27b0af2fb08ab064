"""The picture of a comparison: two distances for every tensor."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from enorm_fx.errors import ArgumentError, cannot_write

if TYPE_CHECKING:
    from enorm_fx.comparing import Comparison

# Okabe and Ito's palette, as in the demo's picture: told apart by colour-blind readers.
_AS_THEY_ARE, _CANONICAL, _QUIET = "#D55E00", "#0072B2", "#999999"
_LINE, _TALLEST = 0.21, 60.0  # inches for a tensor, and for the picture


def draw(found: Comparison, names: tuple[str, str], path: Path) -> None:
    """Draw a row for each tensor, in the model's order. Raises ArgumentError where the file cannot
    be written."""
    # A Figure of its own draws without a display and leaves pyplot's global state alone.
    from matplotlib.figure import Figure

    rows = found.tensors
    height = min(_TALLEST, 2.0 + _LINE * len(rows))
    figure = Figure(figsize=(8.5, height), layout="constrained")
    axes = figure.subplots()
    positive = [x for d in rows for x in (d.before, d.after) if x > 0]
    rounding = max((d.rounding for d in rows), default=0.0)
    least = min([*positive, *filter(None, [rounding]), 0.1])
    floor = least / 30  # where zeros are drawn
    places = range(len(rows))
    before = [max(d.before, floor) for d in rows]
    after = [max(d.after, floor) for d in rows]
    axes.hlines(places, after, before, color=_QUIET, alpha=0.4, linewidth=1.5)
    axes.plot(before, places, "o", color=_AS_THEY_ARE, markersize=5, label="as they are")
    axes.plot(after, places, "D", color=_CANONICAL, markersize=4, label="in canonical form")
    if rounding:
        axes.axvline(rounding, color=_QUIET, linestyle=":", label=f"rounding ({rounding:.0e})")
    axes.set_xscale("log")
    axes.set_xlim(floor / 2, 4)
    if min([*before, *after], default=1.0) == floor:
        axes.axvline(floor, color=_QUIET, linewidth=0.6)
        axes.text(floor, 1.0, "0", transform=axes.get_xaxis_transform(), ha="center", va="bottom")
    axes.set_ylim(len(rows) - 0.3, -0.7)  # the first tensor on top
    labels = [d.name for d in rows]
    size = min(8.5, max(2.0, 72 * (height - 2.0) / max(len(rows), 1) * 0.7))
    axes.set_yticks(places, labels, fontsize=size, family="monospace")
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("relative l2 distance, |a - b| / max(|a|, |b|)")
    figure.suptitle(f"{Path(names[0]).name} and {Path(names[1]).name}", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=150)
    try:
        path.write_bytes(drawn.getvalue())
    except OSError as error:
        raise ArgumentError(cannot_write(path, error)) from error
