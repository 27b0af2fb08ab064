"""The demo's picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from enorm_fx.demo.training import Training

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey by the markers.
START, WITHOUT, WITH = "#999999", "#D55E00", "#0072B2"


def draw(
    output: Path, badly_scaled: tuple[Training, Training], ordinary: tuple[Training, Training]
) -> None:
    """Write a PNG: training loss by epoch from both starts, and each weight's norm.

    Each start: its runs without and with ENorm.
    """
    # A Figure of its own draws with Agg and leaves pyplot's global state alone.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(13, 4.4), layout=ConstrainedLayoutEngine(wspace=0.06))
    bad, fair, norms = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    _draw_loss(bad, "Badly scaled start: the same function", *badly_scaled)
    _draw_loss(fair, "Ordinary start", *ordinary)
    both = (bad, fair)
    limits = [axes.get_ylim() for axes in both]
    for axes in both:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    _draw_norms(norms, badly_scaled[1])
    figure.savefig(output, format="png", dpi=150)


def _draw_loss(axes: Axes, title: str, without: Training, with_enorm: Training) -> None:
    """The mean training loss of each epoch, on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    for run, label, colour, style in (
        (without, "SGD", WITHOUT, "--"),
        (with_enorm, "SGD with ENorm", WITH, "-"),
    ):
        epochs = range(1, len(run.train_loss) + 1)
        if run.diverged_in is not None:
            label = f"{label}: diverges in step {run.diverged_in}"
        axes.plot(epochs, run.train_loss, style, color=colour, label=label, linewidth=2, marker=".")
        if run.diverged_in is not None:
            last = run.train_loss[-1] if run.train_loss else 2.3  # about that of guessing
            at = (len(run.train_loss) + 0.5, last)
            axes.plot(*at, "X", color=colour, markersize=13, clip_on=False)
    longest = max(len(run.train_loss) for run in (without, with_enorm))
    axes.set_xlim(0.3, longest + 0.7)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean cross-entropy (nats)")
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left")


def _draw_norms(axes: Axes, run: Training) -> None:
    """The l2 norm of each weight before training and after it."""
    layers = list(run.norms_before)
    for shift, norms, label, colour, marker in (
        (-0.12, run.norms_before, "before training", START, "s"),
        (0.12, run.norms_after, "after training with ENorm", WITH, "D"),
    ):
        places = [number + shift for number in range(len(layers))]
        axes.plot(places, [norms[layer] for layer in layers], marker, color=colour, label=label)
    axes.set_yscale("log")
    axes.margins(y=0.2)
    axes.set_xticks(range(len(layers)), layers, rotation=40, ha="right")
    axes.set_ylabel("l2 norm")
    axes.set_title("Badly scaled start: weights of each layer")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, ncols=2, loc="upper center", columnspacing=1.5, handletextpad=0.1)
