"""How long until something happens: `python -m benchmarks.start`.

Commands of `enorm-fx` that need no torch, and the first analysis of a process against later ones,
each in processes of their own. The first one meets imports that torch puts off until it makes fake
tensors (`torch._dynamo`, which torchvision and every optimizer of torch load as well), so it is
measured as it comes and after that import. Prints tables and writes start.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._environment import RESULTS, environment, write_json

COMMANDS = ("--help", "--version", "ops")
LATER = 5  # analyses after the first one

_ANALYSES = """
import json, sys, time
names = json.loads(sys.argv[1])
seconds = {}
for name in names:
    start = time.perf_counter()
    __import__(name)
    seconds[f"import {name}"] = time.perf_counter() - start
import torch
from benchmarks.models import fully_convolutional
torch.set_num_threads(1)
model = fully_convolutional(3, 10, norm="bn").eval()
taken = []
for _ in range(1 + int(sys.argv[2])):
    start = time.perf_counter()
    sys.modules["enorm_fx.analysis"].analyze(model)
    taken.append(time.perf_counter() - start)
seconds["first analysis"] = taken[0]
seconds["later analyses"] = sorted(taken[1:])[len(taken) // 2 - 1]
print(json.dumps(seconds))
"""
CASES = {
    "as it comes": ("torch", "enorm_fx.analysis"),
    "after torch._dynamo": ("torch", "torch._dynamo", "enorm_fx.analysis"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="processes for each figure")
    parser.add_argument("--output", type=Path, default=RESULTS / "start.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    # Cases take turns, so that a busy spell of the machine meets all of them.
    commands: dict[str, list[float]] = {command: [] for command in COMMANDS}
    analyses: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(options.repeats):
        for command, seconds in commands.items():
            seconds.append(_command(command))
        for case, runs in analyses.items():
            runs.append(_analyses(CASES[case]))
    record = {
        "environment": environment(torch.device("cpu"), 0),
        "repeats": options.repeats,
        "commands": {command: _spread(seconds) for command, seconds in commands.items()},
        "analyses": {
            case: {figure: _spread([run[figure] for run in runs]) for figure in runs[0]}
            for case, runs in analyses.items()
        },
    }
    write_json(options.output, record)
    _show(Console(), record)
    return 0


def _command(command: str) -> float:
    """Seconds from the start of a process to its end."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "enorm_fx", command], check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def _analyses(imports: Sequence[str]) -> dict[str, float]:
    """Seconds that each import takes, then the first analysis, and the median of later ones."""
    run = subprocess.run(
        [sys.executable, "-c", _ANALYSES, json.dumps(imports), str(LATER)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    seconds: dict[str, float] = json.loads(run.stdout)
    return seconds


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def _show(console: Console, record: dict[str, Any]) -> None:
    for title, figures in (("commands", record["commands"]), *record["analyses"].items()):
        table = Table("", "median s", "min", "max", title=title, title_justify="left")
        for name, figure in figures.items():
            table.add_row(name, *(f"{figure[key]:.3f}" for key in ("median", "min", "max")))
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
