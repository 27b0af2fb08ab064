"""The picture of `python -m benchmarks.analysis`: seconds by size, a panel for each network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Okabe and Ito's palette: told apart by colour-blind readers.
_COLOURS = {"enorm_fx": "#0072B2", "brevitas": "#D55E00", "torch-pruning": "#009E73"}
_MARKERS = {"enorm_fx": "o", "brevitas": "s", "torch-pruning": "^"}
_TITLES = {
    "chain": "chain of linear layers",
    "residual": "residual blocks",
    "dense": "DenseNet-like concatenations",
    "llama": "Llama, width 8,192 (meta device)",
}


def draw(path: Path, record: Mapping[str, Any]) -> None:
    """Write a PNG. record: what lies in the JSON. A straight grey line is a cost that grows as the
    network does."""
    # A Figure of its own draws with Agg and leaves pyplot's global state alone.
    from matplotlib.figure import Figure

    curves = record["curves"]
    figure = Figure(figsize=(3.4 * len(curves), 3.3), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (kind, passes) in zip(panels, curves.items(), strict=True):
        for name, measured in passes.items():
            points = [point for point in measured if "error" not in point]
            sizes = [point["size"] for point in points]
            seconds = [point["seconds"] for point in points]
            axes.loglog(
                sizes, seconds, marker=_MARKERS[name], color=_COLOURS[name], label=name, linewidth=2
            )
            if name == "enorm_fx":
                line = [seconds[0] * size / sizes[0] for size in sizes]
                axes.loglog(sizes, line, "--", color="#999999", linewidth=1, zorder=0)
        axes.set_title(_TITLES[kind], fontsize=10)
        axes.set_xlabel("size")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    panels[0].set_ylabel("seconds of one thread")
    panels[min(1, len(panels) - 1)].legend(frameon=False)
    figure.savefig(path, format="png", dpi=110)
