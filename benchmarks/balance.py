"""How many cycles `balance` needs, with the coarse correction and without.

    python -m benchmarks.balance [--networks NAME ...] [--seed N] [--out FILE]

Each network's weights are first unbalanced: every unit is scaled by e^x, x normal with mean 0 and
standard deviation 2 (so N(0, 2) is read). Then two descents start from the same weights: the
plain one (a pass over all groups per cycle) and the corrected one that `balance` runs (the same
pass, then the best single scale for each whole group). After every cycle two figures are taken,
outside of the time that is reported:

    objective gap   (J - J*) / J*, of the part of J that can move; J* the converged optimum
    imbalance       the largest |P - N| / (P + N) of a channel, as `Report.gap`

All in float64, where an objective gap of 1e-15 is rounding. A descent ends when both are at most
1e-10, after 300 cycles or after 60 seconds spent in cycles.

The networks with BatchNorm are analysed as `balance` does by default (batchnorm="affine"). Every
BatchNorm then pins what it receives, no weight belongs to two groups, and one cycle is exact; so
they are measured with batchnorm="skip" as well, as in the paper, where the groups are coupled.

Prints a table, writes the JSON and, beside it, a picture if matplotlib is there. The exit status is
1 if the corrected descent takes more than 15 cycles to an objective gap of 1e-10 anywhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torchvision.models import get_model

import enorm_fx
from benchmarks._balance_plot import draw
from benchmarks._environment import RESULTS, environment, write_json
from benchmarks.unet import UNet
from enorm_fx.model_plan import Plan
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.coarse import Coarse, correct_, make_coarse, unbounded
from enorm_fx.step.descent import Descent, alive, imbalance, log_cost, sweep_

TOLERANCE = 1e-10
ALLOWED = 15  # corrected cycles to an objective gap of TOLERANCE
SPREAD = 2.0  # standard deviation of the log scales at the start
_PATIENCE = 10  # cycles without a lower J, after which what is left is rounding
_WIDTH = 48


@dataclass(frozen=True, slots=True)
class Network:
    """How to build a network, the shape of an input, and what its analysis does with BatchNorm."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batchnorm: str = "affine"


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a descent is given up; seconds are those of its cycles alone."""

    cycles: int = 300
    seconds: float = 60.0


def mlp(depth: int, width: int = _WIDTH) -> nn.Sequential:
    """`depth` linear layers with ReLU between them. Shapes: input (N, width), output (N, 10).

    Raises ValueError for a depth below 2: nothing could be rescaled.
    """
    if depth < 2:
        raise ValueError(f"a chain has two layers or more, not {depth}")
    hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


NETWORKS = {
    **{f"chain of {n}": Network(partial(mlp, n), (1, _WIDTH)) for n in (5, 15, 50, 200)},
    "U-Net": Network(UNet, (1, 3, 64, 64)),
    **{
        f"{name}{note}": Network(partial(get_model, name, weights=None), (1, 3, 224, 224), mode)
        for mode, note in (("skip", " (skip)"), ("affine", ""))
        for name in ("resnet50", "densenet121")
    },
}


def measure(network: Network, seed: int, limits: Limits | None = None) -> dict[str, Any]:
    """Both descents from the same unbalanced weights; what the JSON says of a network."""
    torch.manual_seed(seed)
    model = network.build().eval()
    plan = enorm_fx.analyze(model, torch.randn(network.shape), batchnorm=network.batchnorm)
    plan.rescale_(SPREAD * torch.randn(plan.num_scales, dtype=torch.float64))
    descent, coarse = begin(plan)
    best, optimum = find_optimum(descent, coarse)
    limits = limits or Limits()
    return {
        "batchnorm": network.batchnorm,
        "groups": len(plan.groups),
        "scales": plan.num_scales,
        "optimum": optimum,
        "plain": descend(descent, None, best, limits),
        "corrected": descend(descent, coarse, best, limits),
    }


@torch.no_grad()
def begin(plan: Plan) -> tuple[Descent, Coarse]:
    """The descent of `balance` (p = 2, c = 1) at the weights as they are, and its coarse problem.

    Raises ValueError if J has no minimum along some group.
    """
    program = CarefulStep(plan, plan.groups, p=2.0, c=1.0, wide=True)
    program.bind_()
    descent, _ = program.measure_()
    coarse = make_coarse(descent, alive(descent))
    if unbounded(descent, coarse):
        raise ValueError("J has no minimum along some group, so there is no gap to measure")
    return descent, coarse


def cycle_(descent: Descent, coarse: Coarse | None) -> None:
    """One cycle as `balance` runs it; without the correction if there is no coarse problem."""
    sweep_(descent, exact=False)
    if coarse is not None:
        correct_(descent, coarse)


@torch.no_grad()
def find_optimum(descent: Descent, coarse: Coarse) -> tuple[float, dict[str, Any]]:
    """log J* by corrected cycles until J no longer falls, and how sure that is.

    J is convex: the imbalance, which is 0 at an optimum alone, tells whether this is one.
    """
    descent.u.zero_()
    best, idle, cycles = math.inf, 0, 0
    while idle < _PATIENCE:
        cycle_(descent, coarse)
        cycles += 1
        cost = float(log_cost(descent))
        best, idle = (cost, 0) if cost < best else (best, idle + 1)
    return best, {"cycles": cycles, "imbalance": _rounded(float(imbalance(descent)))}


@torch.no_grad()
def descend(descent: Descent, coarse: Coarse | None, best: float, limits: Limits) -> dict[str, Any]:
    """Cycles from u = 0 until both figures are at most TOLERANCE. best: log J*.

    objective_gap, imbalance: before the first cycle, then after each.
    cycles_to_...:            cycles until the figure is at most TOLERANCE; None if it never was.
    seconds_per_cycle:        median, fastest and slowest; None if there was no cycle.
    capped:                   the limit that ended the descent, "cycles" or "seconds"; else None.
    """
    descent.u.zero_()
    gaps: list[float] = []
    imbalances: list[float] = []
    seconds: list[float] = []
    capped = None
    while True:
        # Close to J* rounding may show a J below it.
        gaps.append(_rounded(max(0.0, math.expm1(float(log_cost(descent)) - best))))
        imbalances.append(_rounded(float(imbalance(descent))))
        if gaps[-1] <= TOLERANCE and imbalances[-1] <= TOLERANCE:
            break
        if len(seconds) >= limits.cycles:
            capped = "cycles"
            break
        if sum(seconds) >= limits.seconds:
            capped = "seconds"
            break
        before = time.perf_counter()
        cycle_(descent, coarse)
        seconds.append(time.perf_counter() - before)
    return {
        "cycles_to_objective_gap": first_within(gaps),
        "cycles_to_imbalance": first_within(imbalances),
        "capped": capped,
        "seconds_per_cycle": _spread(seconds),
        "objective_gap": gaps,
        "imbalance": imbalances,
    }


def first_within(figures: Sequence[float], tolerance: float = TOLERANCE) -> int | None:
    """The first position from which all figures are at most the tolerance; None if there is none.

    Raises ValueError for a tolerance that is not positive.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, not {tolerance}")
    above = [at for at, figure in enumerate(figures) if not figure <= tolerance]
    first = above[-1] + 1 if above else 0
    return first if first < len(figures) else None


def table(networks: dict[str, dict[str, Any]]) -> Table:
    """One line a network: cycles to each tolerance and what a cycle takes, plain / corrected."""
    out = Table(title=f"Cycles to {TOLERANCE:g}, and time of a cycle: plain / corrected")
    out.add_column("network", no_wrap=True)
    for heading in ("groups", "scales", "gap of J", "imbalance", "ms a cycle"):
        out.add_column(heading, justify="right")
    for name, row in networks.items():
        runs = (row["plain"], row["corrected"])
        out.add_row(
            name,
            str(row["groups"]),
            f"{row['scales']:,}",
            " / ".join(cycles(run, "objective_gap") for run in runs),
            " / ".join(cycles(run, "imbalance") for run in runs),
            " / ".join(_milliseconds(run["seconds_per_cycle"]) for run in runs),
        )
    return out


def cycles(run: dict[str, Any], figure: str) -> str:
    """Cycles to the tolerance in words: '5', or '> 300' where a limit came first."""
    found = run[f"cycles_to_{figure}"]
    return f"> {len(run[figure]) - 1}" if found is None else str(found)


def slow(networks: dict[str, dict[str, Any]]) -> list[str]:
    """Names of networks on which the corrected descent takes more than ALLOWED cycles."""
    return [
        name
        for name, row in networks.items()
        if (found := row["corrected"]["cycles_to_objective_gap"]) is None or found > ALLOWED
    ]


def _milliseconds(seconds: dict[str, float] | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds['median']:.1f}"


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {
        "median": _rounded(statistics.median(seconds)),
        "fastest": _rounded(min(seconds)),
        "slowest": _rounded(max(seconds)),
    }


def _rounded(value: float) -> float:
    """Three digits: what a reader can use, and a small file."""
    return float(f"{value:.2e}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write JSON and picture; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.balance", description="Count the cycles that balance needs."
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "balance.json", metavar="FILE")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    limits = Limits()
    rows = {}
    for name in options.networks:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows[name] = measure(NETWORKS[name], options.seed, limits)
    record = {
        "benchmark": "balance",
        "environment": environment(torch.device("cpu"), options.seed),
        "tolerance": TOLERANCE,
        "spread": SPREAD,
        "most_cycles": limits.cycles,
        "most_seconds": limits.seconds,
        "networks": rows,
    }
    Console().print(table(rows))
    write_json(options.out, record)
    if importlib.util.find_spec("matplotlib"):
        draw(options.out.with_suffix(".png"), record)
    for name in slow(rows):
        print(f"{name}: more than {ALLOWED} corrected cycles to {TOLERANCE:g}", file=sys.stderr)
    return 1 if slow(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
