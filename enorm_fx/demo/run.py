"""`enorm-fx demo`: a small residual network learns to read digits, with and without ENorm.

Both runs start from the same weights and see the same batches. The network has no
normalization layers, so a rescaling keeps its function exactly. Needs the extras of
`pip install 'enorm-fx[demo]'`; they are imported when the demo runs, not before.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.syntax import Syntax
from rich.table import Table

from enorm_fx.analysis import analyze
from enorm_fx.demo.picture import draw
from enorm_fx.demo.training import DigitReader, Digits, Training, layer_name, load_digits, train
from enorm_fx.errors import ArgumentError, EnormError
from enorm_fx.model_plan import Plan

TWO_LINES = """\
enorm = enorm_fx.ENorm(model, optimizer)      # once, before training
for images, labels in batches:
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    enorm.step()                              # after every step of the optimizer
"""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The runs without and with ENorm, and where the picture lies."""

    without: Training
    with_enorm: Training
    picture: Path


def run(
    console: Console,
    output: Path = Path("enorm_demo.png"),
    epochs: int = 30,
    seed: int = 0,
) -> DemoResult:
    """Train twice, print what was found and measured, draw the curves into `output`.

    The same seed gives the same figures on the same machine, times aside. The caller's random
    numbers are left as they were.
    """
    _check(output, epochs)
    data = load_digits(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = DigitReader()
    plan = analyze(model, data.train_images[:2])
    _print_opening(console, data, plan)
    with _one_thread(), Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=2 * epochs)
        without, with_enorm = (
            train(
                copy.deepcopy(model),
                data,
                epochs=epochs,
                seed=seed,
                use_enorm=use_enorm,
                on_epoch=lambda: progress.advance(task),
            )
            for use_enorm in (False, True)
        )
    draw(output, without, with_enorm)
    console.print(_closing_table(without, with_enorm))
    console.print(
        "One run each: with another seed the difference may vanish or turn around.\n"
        f"Loss by epoch and norm of every layer: {output}",
        markup=False,
        highlight=False,
    )
    return DemoResult(without, with_enorm, output)


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
    table.caption = _left_out(plan)
    console.print(table)


def _left_out(plan: Plan) -> str:
    """What ENorm's default, `last_layer=False`, does not use of the plan."""
    last = {parameter.name for parameter in plan.parameters if parameter.last}
    groups = [group for group in plan.groups if last & {*group.producers, *group.consumers}]
    scales = sum(group.channels for group in groups)
    names = ", ".join(sorted(map(layer_name, last)))
    return f"by default ENorm leaves out the {scales} scales that move the last weight ({names})"


def _closing_table(without: Training, with_enorm: Training) -> Table:
    """What came of both runs, side by side."""
    table = Table(title=f"after {len(without.train_loss)} epochs")
    for column in ("", "without ENorm", "with ENorm"):
        table.add_column(column, justify="right" if column else "left")
    runs = (without, with_enorm)

    def row(label: str, figure: Callable[[Training], str]) -> None:
        table.add_row(label, *map(figure, runs))

    row("test accuracy", lambda run: f"{run.test_accuracy:.2%}")
    row("training loss", lambda run: f"{run.train_loss[-1]:.4f}")
    row("weight norm before", lambda run: f"{_total(run.norms_before):.2f}")
    row("weight norm after", lambda run: f"{_total(run.norms_after):.2f}")
    row("training time", lambda run: f"{run.seconds:.1f} s")
    row("of it in ENorm", lambda run: f"{run.enorm_seconds / run.seconds:.1%}")
    return table
