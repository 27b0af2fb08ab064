"""Before and after as a figure: ranges of channels and norms, layer by layer. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from enorm_fx.errors import ArgumentError
from enorm_fx.report.before_after import Layer, Measured
from enorm_fx.report.names import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Grey and a blue of Okabe and Ito's palette, told apart by everybody.
_BEFORE, _AFTER = "#8b949e", "#0072B2"
_NAMED = 40  # layers whose names there is room for
FORMATS = ("pdf", "png", "svg")


def check_plot(path: Path) -> None:
    """Raises ArgumentError where no figure can be written in the form that the path asks for."""
    if path.suffix.lstrip(".").lower() not in FORMATS:
        raise ArgumentError(f"--plot {path}: name a file that ends in .{', .'.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ArgumentError("--plot needs matplotlib: pip install 'enorm-fx[plot]'") from error


def draw(path: Path, form: str, title: str, shown: tuple[Layer, ...]) -> None:
    """Write the figure. form: one of `FORMATS`."""
    # A Figure of its own draws with Agg and leaves pyplot's global state alone.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    width = min(max(7.0, 1.5 + 0.3 * len(shown)), 22.0)
    figure = Figure(figsize=(width, 6.4), layout="constrained")
    ranges, norms = figure.subplots(2, 1, sharex=True, height_ratios=(1.7, 1))
    for side, colour, shift in (("before", _BEFORE, -0.17), ("after", _AFTER, 0.17)):
        measured: list[Measured] = [getattr(layer, side) for layer in shown]
        _draw_ranges(ranges, measured, colour, shift)
        places = [number + shift for number in range(len(shown))]
        norms.bar(places, [m.norm for m in measured], 0.3, color=colour, label=side)
    ranges.set_yscale("log")
    ranges.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ranges.yaxis.set_major_formatter("{x:g}")
    ranges.yaxis.set_minor_formatter("")
    ranges.set_ylabel("largest |w| of a channel")
    ranges.set_title(title, loc="left", fontsize=11)
    norms.set_ylabel(r"$l_2$ norm")
    norms.legend(frameon=False, ncols=2, loc="upper right", bbox_to_anchor=(1, 1.16))
    for axes in (ranges, norms):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    step = -(-len(shown) // _NAMED) or 1
    names = [_tail(short(layer.name)) for layer in shown]
    norms.set_xticks(range(0, len(shown), step), names[::step], rotation=50, ha="right", fontsize=8)
    norms.set_xlim(-0.8, len(shown) - 0.2)
    figure.savefig(path, format=form, dpi=150)


def _draw_ranges(axes: Axes, measured: list[Measured], colour: str, shift: float) -> None:
    """A thin line from the smallest to the largest, a thick one over the middle half, a dot."""
    for number, one in enumerate(measured):
        positive = one.ranges[one.ranges > 0]
        if not len(positive):
            continue
        # By sorting: torch.quantile takes at most 16 million numbers.
        ordered = positive.sort().values
        marks = torch.linspace(0, len(ordered) - 1, 5).round().long()
        low, first, middle, third, high = ordered[marks].tolist()
        x = number + shift
        axes.vlines(x, low, high, color=colour, linewidth=1)
        axes.vlines(x, first, third, color=colour, linewidth=5, alpha=0.55)
        axes.plot(x, middle, "o", color=colour, markersize=4)


def _tail(name: str, most: int = 28) -> str:
    """The end of a long name, which tells more than its beginning."""
    return name if len(name) <= most else "…" + name[-most:]
