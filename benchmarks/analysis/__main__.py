"""How long an analysis takes, and how its cost grows: `python -m benchmarks.analysis`.

Real models first, then networks that grow; each point of a curve is measured in a process of its
own, on one thread. `--peer brevitas=PYTHON` measures the graph pass of another library beside
ours, by a Python that can import it; after a point that took longer than `--patience` seconds it
gets no larger ones. Writes analysis.json and analysis.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._environment import RESULTS, environment, write_json
from benchmarks.analysis import models
from benchmarks.analysis.networks import SIZES
from benchmarks.analysis.plot import draw

_BLOCKS = {"chain": "layers", "residual": "blocks", "dense": "concatenations", "llama": "layers"}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables, write the JSON and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analysis", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--patience", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--output", type=Path, default=RESULTS / "analysis.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    peers = dict(peer.split("=", 1) for peer in options.peer)
    kinds = [k for k in SIZES if k != "llama" or importlib.util.find_spec("transformers")]
    record = {
        "environment": environment(torch.device("cpu"), 0),
        "repeats": options.repeats,
        "curves": {
            kind: {
                name: _curve(kind, name, python, options)
                for name, python in {"enorm_fx": sys.executable, **peers}.items()
                if name == "enorm_fx" or kind != "llama"
            }
            for kind in kinds
        },
        "models": {
            name: models.measure(build, options.repeats)
            for name, build in models.builders().items()
        },
    }
    write_json(options.output, record)
    draw(options.output.with_suffix(".png"), record)
    _show(Console(), record)
    return 0


def _curve(kind: str, name: str, python: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = []
    for size in SIZES[kind]:
        if name != "enorm_fx" and points and points[-1]["seconds"] > options.patience:
            break
        repeats = 1 if kind == "llama" or name != "enorm_fx" else options.repeats
        command = [python, "-m", "benchmarks.analysis.point", kind, str(size)]
        command += ["--pass", name, "--repeats", str(repeats)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode and name != "enorm_fx":  # what another library cannot do is a finding
            points.append({"size": size, "error": run.stderr.strip().splitlines()[-1]})
            break
        run.check_returncode()
        points.append(json.loads(run.stdout.splitlines()[-1]))
    return points


def _show(console: Console, record: dict[str, Any]) -> None:
    table = Table("model", "first s", "median s", "scales", "groups", "memory MiB")
    for name, row in record["models"].items():
        table.add_row(
            name, f"{row['first']:.2f}", f"{row['median']:.2f}", f"{row['scales']:,}",
            str(row["groups"]), f"{row['peak_growth_mib']:.0f}",
        )  # fmt: skip
    console.print(table)
    table = Table("network", "pass", "size", "seconds", "ms a block", "regions", "memory MiB")
    for kind, passes in record["curves"].items():
        for name, points in passes.items():
            for point in points:
                if "error" in point:
                    size = f"{point['size']:,} {_BLOCKS[kind]}"
                    table.add_row(kind, name, size, point["error"])
                    continue
                table.add_row(
                    kind, name, f"{point['size']:,} {_BLOCKS[kind]}", f"{point['seconds']:.2f}",
                    f"{1000 * point['seconds'] / point['size']:.2f}", str(point["regions"]),
                    f"{point['peak_growth_mib']:.0f}",
                )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
