"""`enorm-fx demo`: a small residual network learns to read digits, with and without ENorm.

It starts from the weights that torch draws, and from others that compute the same and are badly
scaled; all runs see the same batches. The network has no normalization layers, so a rescaling
keeps its function exactly. Needs the extras of
`pip install 'enorm-fx[demo]'`; they are imported when the demo runs, not before.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.syntax import Syntax
from rich.table import Table
from torch import nn

from enorm_fx.analysis import analyze
from enorm_fx.demo.picture import draw
from enorm_fx.demo.training import (
    LEARNING_RATE,
    SIGMA,
    DigitReader,
    Digits,
    Training,
    badly_scaled,
    layer_name,
    load_digits,
    train,
)
from enorm_fx.enorm import ENorm
from enorm_fx.errors import ArgumentError, EnormError
from enorm_fx.model_plan import Plan

TWO_LINES = """\
enorm = enorm_fx.ENorm(model, optimizer)  # once
for images, labels in batches:
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    enorm.step()                          # after every step of the optimizer
"""


@dataclass(frozen=True, slots=True)
class Runs:
    """Four runs: from a badly scaled start and from an ordinary one, without and with ENorm."""

    badly_scaled: tuple[Training, Training]
    ordinary: tuple[Training, Training]


def run(
    console: Console,
    output: Path = Path("enorm_demo.png"),
    epochs: int = 10,
    seed: int = 0,
) -> Runs:
    """Train four times, print what was found and measured, draw the curves into `output`.

    The same seed gives the same figures on the same machine, times aside. The caller's random
    numbers are left as they were.
    """
    _check(output, epochs)
    data = load_digits(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = DigitReader()
    example = data.train_images[:2]
    _print_opening(console, data, analyze(model, example))
    with _one_thread(), Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=4 * epochs)

        def trained(start: nn.Module, use_enorm: bool) -> Training:
            return train(
                copy.deepcopy(start),
                data,
                epochs=epochs,
                seed=seed,
                use_enorm=use_enorm,
                on_epoch=lambda: progress.advance(task),
            )

        # The first step on a machine compiles the program of all later ones: not in these figures.
        ENorm(copy.deepcopy(model)).step()
        unbalanced = badly_scaled(model, example, seed)
        runs = Runs(
            (trained(unbalanced, False), trained(unbalanced, True)),
            (trained(model, False), trained(model, True)),
        )
    draw(output, runs.badly_scaled, runs.ordinary)
    console.print(_closing_table(epochs, runs))
    console.print(
        "One run each: other seeds give other figures.\n"
        f"Loss by epoch and norm of every layer: {output}",
        markup=False,
        highlight=False,
    )
    return runs


@contextmanager
def _one_thread() -> Iterator[None]:
    """The network is too small for more, and sums do not depend on the machine's cores then."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check(output: Path, epochs: int) -> None:
    """Refuse now what would otherwise fail after the training."""
    needed = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise EnormError(f"the demo needs {' and '.join(missing)}: pip install 'enorm-fx[demo]'")
    if epochs < 1:
        raise ArgumentError(f"epochs must be 1 or more, not {epochs}")
    if output.suffix.lower() != ".png":
        raise ArgumentError(f"the demo draws a PNG: {output} must end in .png")
    if not output.parent.is_dir():
        raise ArgumentError(f"{output.parent}, where the picture should go, is no folder")


def _total(norms: dict[str, float]) -> float:
    """The l2 norm of all weights together."""
    return math.hypot(*norms.values())


def _print_opening(console: Console, data: Digits, plan: Plan) -> None:
    """What is trained, the two lines of ENorm, and the pairs that were found."""
    console.print(
        f"A residual ReLU network without normalization, {len(data.train_labels)} digits to learn "
        f"from, {len(data.test_labels)} to test on.\nENorm is two lines of the training loop:\n",
        highlight=False,
    )
    console.print(Syntax(TWO_LINES, "python", background_color="default"))
    table = Table(title=f"{len(plan.direct_pairs)} rescalable pairs, {plan.num_scales} free scales")
    for column in ("producer", "consumer"):
        table.add_column(column)
    table.add_column("channels", justify="right")
    table.add_column("via")
    for pair in plan.direct_pairs:
        table.add_row(
            layer_name(pair.producer),
            layer_name(pair.consumer),
            str(pair.channels),
            ", ".join(pair.via),
        )
    console.print(table)
    console.print(
        "It starts from the weights that torch draws, and from the same function badly scaled:\n"
        f"each of the {plan.num_scales} channels multiplied by e^x, x normal with standard "
        f"deviation {SIGMA:g}.\n",
        highlight=False,
    )


def _closing_table(epochs: int, runs: Runs) -> Table:
    """What came of the four runs, one below the other."""
    table = Table(
        title=f"after {epochs} epochs of SGD, learning rate {LEARNING_RATE}",
        caption="in ENorm: share of the time of training",
    )
    for column in ("start", "trained by", "accuracy", "loss", "weight norm", "in ENorm"):
        side = "left" if column in ("start", "trained by") else "right"
        table.add_column(column, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for start, pair in (("badly scaled", runs.badly_scaled), ("ordinary", runs.ordinary)):
        for name, run in zip(("SGD", "SGD, ENorm"), pair, strict=True):
            before = f"{_total(run.norms_before):.4g}"
            if run.diverged_in is not None:
                table.add_row(start, name, "diverges", f"step {run.diverged_in}", before)
                continue
            table.add_row(
                start,
                name,
                f"{run.test_accuracy:.2%}",
                f"{run.train_loss[-1]:.4f}",
                f"{before} -> {_total(run.norms_after):.4g}",
                f"{run.enorm_seconds / run.seconds:.1%}" if run.enorm_seconds else "",
            )
    return table
