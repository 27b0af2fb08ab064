"""The command line of `python -m benchmarks.train`, which the sweep speaks too."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models import NORMS

DATA_SETS = ("cifar10", "fashion-mnist", "digits", "text")
MODELS = ("linear", "conv", "resnet", "vgg", "transformer")


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line's options, one by one."""

    dataset: str
    data_path: Path | None
    images: int | None
    pool: int
    validation: int
    model_type: str
    n_layers: int
    width: int | None
    norm: str
    sigma: float
    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    weight_decay: float
    momentum: float
    amp: bool
    balance_once: bool
    enorm: float
    start: str
    last_layer: bool
    converge: bool
    cycles: int
    every: int
    order: str
    n_iter: int
    seed: int
    device: str
    resume: bool
    output: Path | None


def parse_arguments(arguments: Sequence[str] | None) -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description="Train the paper's networks, or small others, with or without ENorm.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    add("--dataset", choices=DATA_SETS, default="cifar10")
    add("--data-path", type=Path, help="folder of the data set's files, or the file of a text")
    add("--images", type=_positive, help="only the first of them, to train and to test on")
    add("--pool", type=_positive, default=1, help="means over so many pixels each way")
    add("--validation", type=_count, default=0, help="training images that are held out")
    add("--model-type", choices=MODELS, default="linear")
    add("--n-layers", type=_positive, default=15, help="of the linear model, of the transformer")
    add("--width", type=_positive, help="(default: the model's own)")
    add("--norm", choices=NORMS, default="bn", help="BatchNorm, GroupNorm or none")
    add("--sigma", type=_not_negative, default=0.0, help="start with units rescaled by e^N(0, ·)")
    add("--epochs", type=_positive, default=60)
    add("--batch-size", type=_positive, default=256)
    add("--optimizer", choices=("sgd", "adamw"), default="sgd")
    add("--lr", type=_not_negative, default=0.1, help="first learning rate; falls linearly to 0")
    add("--weight-decay", type=_not_negative, default=1e-3)
    add("--momentum", type=_not_negative, default=0.0, help="of sgd")
    add("--amp", action=switch, default=False, help="train under autocast to bfloat16")
    add("--balance-once", action=switch, default=False, help="enorm_fx.balance before training")
    add("--enorm", type=_not_negative, default=0.0, metavar="C", help="ENorm's c; 0: no ENorm")
    add("--start", choices=("balanced", "as_is"), default="as_is", help="of ENorm")
    add("--last-layer", action=switch, default=False, help="of ENorm")
    add("--converge", action=switch, default=False, help="of ENorm")
    add("--cycles", type=_positive, default=1, help="of ENorm")
    add("--every", type=_positive, default=1, help="of ENorm")
    add("--order", choices=("sequential", "colored", "simultaneous"), default="sequential")
    add("--n-iter", type=_positive, default=1, help="runs, each from its own seed")
    add("--seed", type=int, default=0, help="seed of the first run; the next ones count up")
    add("--device", default="cpu")
    add("--resume", action=switch, default=False, help="keep the runs that the output has")
    add("--output", type=Path, metavar="FILE", help="JSON file (default: in benchmarks/results)")
    return Settings(**vars(parser.parse_args(arguments)))


def default_name(settings: Settings) -> str:
    """A file name that tells the paper's configurations apart."""
    model = settings.model_type
    if model == "linear":
        model += str(settings.n_layers)
    norm = {"none": "nobn"}.get(settings.norm, settings.norm)
    return f"train-{settings.dataset}-{model}-{norm}-enorm{settings.enorm:g}"


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is not 0 or more")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{number} is not a finite number of 0 or more")
    return number
