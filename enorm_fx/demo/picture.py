"""The demo's picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from enorm_fx.demo.training import Training

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey by the markers.
START, WITHOUT, WITH = "#999999", "#D55E00", "#0072B2"


def draw(output: Path, without: Training, with_enorm: Training) -> None:
    """Write a PNG: training loss by epoch, and each weight's norm before and after."""
    # A Figure of its own draws with Agg and leaves pyplot's global state alone.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(11, 4.4), layout=ConstrainedLayoutEngine(wspace=0.06))
    loss_axes, norm_axes = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_loss(loss_axes, without, with_enorm)
    _draw_norms(norm_axes, without, with_enorm)
    figure.savefig(output, format="png", dpi=150)


def _draw_loss(axes: Axes, without: Training, with_enorm: Training) -> None:
    """The mean training loss of each epoch, on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    for run, label, colour, style in (
        (without, "without ENorm", WITHOUT, "--"),
        (with_enorm, "with ENorm", WITH, "-"),
    ):
        epochs = range(1, len(run.train_loss) + 1)
        axes.plot(epochs, run.train_loss, style, color=colour, label=label, linewidth=2, marker=".")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean cross-entropy (nats)")
    axes.set_title("Training loss, same start and same batches")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _draw_norms(axes: Axes, without: Training, with_enorm: Training) -> None:
    """The l2 norm of each weight before training and after both runs."""
    layers = list(without.norms_before)
    # Side by side, because equal norms would hide each other.
    for shift, norms, label, colour, marker in (
        (-0.22, without.norms_before, "before training", START, "s"),
        (0.0, without.norms_after, "after, without ENorm", WITHOUT, "o"),
        (0.22, with_enorm.norms_after, "after, with ENorm", WITH, "D"),
    ):
        places = [number + shift for number in range(len(layers))]
        heights = [norms[layer] for layer in layers]
        axes.vlines(places, 0, heights, color=colour, alpha=0.35, linewidth=2)
        axes.plot(places, heights, marker, color=colour, label=label, markersize=6)
    axes.margins(y=0.28)
    axes.set_xticks(range(len(layers)), layers, rotation=40, ha="right")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("l2 norm")
    axes.set_title("Weights of each layer")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, ncols=3, loc="upper center", columnspacing=1.5, handletextpad=0.1)
