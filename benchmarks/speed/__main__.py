"""What one ENorm step costs, beside an SGD step and in a training step.

    python -m benchmarks.speed [--networks NAME ...] [--backends NAME ...] [--device cuda]

On the paper's two networks, resnet18, resnet50, vgg16, an MLP of 50 layers of width 64 and a Llama
of 101M parameters, with momentum: one cycle on each backend against torch's fused SGD step, a plain
loop over the layers and the bare passes over the data (the floor); the same as a part of a training
step, beside what BatchNorm and GroupNorm add there; a step that converges; more cycles, other
orders, growing networks; the time to build a step. In every measurement contenders take turns in an
order that is drawn anew each round, and medians are compared within it. Backends and orders that
this version or this machine does not have are left out and named.

As in training, an ENorm or loop step is preceded by an SGD step that is not timed, the SGD step by
an ENorm step: caches hold what they hold in use. The learning rate is 0, so nothing drifts.

On CUDA times are taken by events, and kernel launches are counted. Writes one JSON with machine,
versions and seed, and a picture beside it if matplotlib is there; the README's table is printed of
it by `python -m benchmarks.speed.table`. Nothing else should run meanwhile: threads that wait for
a core make steps of a millisecond take ten.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks._environment import RESULTS, environment, write_json
from benchmarks.speed.bench import Bench
from benchmarks.speed.converging import converge_costs
from benchmarks.speed.costs import bandwidths, median_visit, step_costs, training_costs
from benchmarks.speed.networks import networks
from benchmarks.speed.report import BACKENDS, bars, show
from benchmarks.speed.settings import build_costs, cycle_costs, order_costs, size_costs

SECTIONS = ("build", "step", "training", "converge", "cycles", "orders", "sizes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables, write JSON and picture; returns the exit status."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA device", file=sys.stderr)
        return 2
    bench = Bench(
        device,
        tuple(options.backends),
        options.rounds,
        options.budget,
        options.seed,
        options.visits,
    )
    record = run(bench, options.networks, options.sections, Console(stderr=True))
    write_json(options.out, record)
    show(record, Console(width=None if sys.stdout.isatty() else 150))
    if record.get("step") and importlib.util.find_spec("matplotlib"):
        from benchmarks.speed.plot import draw

        draw(options.out.with_suffix(".png"), record)
    return 0


def run(
    bench: Bench, names: Sequence[str], sections: Sequence[str], progress: Console
) -> dict[str, Any]:
    """Every section that was asked for, in one process. Building comes first: nothing is warm."""
    known = networks()
    begin = time.perf_counter()

    def note(what: str) -> None:
        progress.print(f"{time.perf_counter() - begin:6.0f} s  {what}", highlight=False)

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        note(f"warning: the load is {load:.1f}: something else runs, and threads wait for it")
    if not importlib.util.find_spec("transformers"):
        note("left out: Llama 101M (pip install transformers)")
    single: dict[str, Callable[[], dict[str, Any]]] = {
        "build": lambda: build_costs(known["resnet50"], bench),
        "cycles": lambda: cycle_costs(known["fully convolutional"], bench),
        "orders": lambda: order_costs(known["MLP 50 x 64"], bench),
        "sizes": lambda: size_costs(bench),
    }
    each = {"training": training_costs, "converge": converge_costs}
    record: dict[str, Any] = {
        "benchmark": "speed",
        "environment": environment(bench.device, bench.seed),
        "load_before": load,
        "rounds": bench.rounds,
        "visits": bench.visits,
        "budget_seconds": bench.budget,
        "unit": "seconds",
    }
    for section in sections:
        if section in single:
            note(section)
            record[section] = single[section]()
            continue
        record[section] = {}
        if section == "step":
            record["bandwidth"] = bandwidths(bench)
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
            for visit in range(1, bench.visits + 1):
                for name in names:
                    note(f"step: {name}, visit {visit} of {bench.visits}")
                    found[name].append(step_costs(known[name], bench, record["bandwidth"]))
            record[section] = {name: median_visit(costs) for name, costs in found.items()}
            continue
        for name in names:
            note(f"{section}: {name}")
            record[section][name] = each[section](known[name], bench)
    bench.release()
    # The bars are set for two cores of a CPU.
    record["bars"] = bars(record) if bench.device.type == "cpu" else []
    record["total_seconds"] = time.perf_counter() - begin
    return record


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = tuple(networks())
    parser.add_argument("--networks", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument(
        "--backends", nargs="+", choices=BACKENDS, default=BACKENDS,
        help="a single one is taken where otherwise ENorm's own choice is measured",
    )  # fmt: skip
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--rounds", type=int, default=20, help="at most so many a measurement")
    parser.add_argument(
        "--budget", type=float, default=5.0, help="seconds after which a measurement ends"
    )
    parser.add_argument(
        "--visits", type=int, default=5, help="times that each network's step is measured"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.json", metavar="JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
