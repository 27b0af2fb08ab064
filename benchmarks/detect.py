"""What other libraries find beside what we find: `python -m benchmarks.detect`.

`--peer brevitas=PYTHON` (and `aimet`, `torch-pruning`) runs a library by a Python that can import
it and torchvision. For each model of torchvision: regions (groups, for us), channels in them,
seconds of one thread from the built model to what was found, and the largest relative change of the
outputs when the library equalizes (`verify`'s, for us). Others fold BatchNorm first; our plans have
`batchnorm="affine"`. Channels of overlapping regions are counted once beside them (`independent`).
Status 1 where a plan is unsound or has fewer channels than a peer that keeps the function.
`--table` prints what an earlier run found, for `docs/results.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._detect_pass import AS_RELU
from benchmarks._environment import RESULTS, environment, write_json

MODELS = (
    "alexnet", "vgg11", "vgg16_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2",
    "mobilenet_v2", "mobilenet_v2" + AS_RELU, "mobilenet_v3_small", "mnasnet1_0",
    "shufflenet_v2_x1_0", "squeezenet1_1", "densenet121", "googlenet", "inception_v3",
    "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "vit_b_16", "swin_t", "fcn_resnet50",
    "deeplabv3_resnet50", "fasterrcnn_resnet50_fpn", "r3d_18", "raft_small",
)  # fmt: skip
OURS = "enorm_fx"
ROOT = Path(__file__).parents[1]
NO_SCALES = ("torch-pruning",)  # counts coupled channels, outputs among them: context only


def main(argv: Sequence[str] | None = None) -> int:
    """Run every library on every model, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detect", description=__doc__)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--only", nargs="*", default=[], metavar="MODEL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "detect.json")
    parser.add_argument("--table", action="store_true", help="print the table of the JSON file")
    options = parser.parse_args(argv)
    if options.table:
        print(markdown(json.loads(options.output.read_text(encoding="utf-8"))))
        return 0
    pythons = {OURS: sys.executable, **dict(peer.split("=", 1) for peer in options.peer)}
    rows: dict[str, dict[str, Any]] = {}
    versions: dict[str, str] = {}
    if options.only and options.output.is_file():  # what is not measured anew stays
        earlier = json.loads(options.output.read_text(encoding="utf-8"))
        rows, versions = earlier["models"], earlier["versions"]
    models = options.only or MODELS
    for library, python in pythons.items():
        for name, found in run(library, python, models, options.seed):
            if name == "version":
                versions[library] = found
            else:
                rows.setdefault(name, {})[library] = found
                print(f"{library}, {name}: {cell(found)}", file=sys.stderr, flush=True)
    problems = wrong(rows)
    record = {
        "environment": {**environment(torch.device("cpu"), options.seed), "threads": 1},
        "versions": versions,
        "problems": problems,
        "models": rows,
    }
    write_json(options.output, record)
    show(Console(), rows, list(versions))
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def run(library: str, python: str, models: Sequence[str], seed: int) -> Iterator[tuple[str, Any]]:
    """("version", text), then (model, what was found) for each; a process that dies takes one."""
    left = list(models)
    first = True
    while left:
        command = [python, "-m", "benchmarks._detect_pass", library, *left, "--seed", str(seed)]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            started = False
            for line in process.stdout:
                try:
                    ((name, found),) = json.loads(line).items()
                except (ValueError, AttributeError):
                    continue  # something that the library itself prints
                if name == "version":
                    started = True
                    if not first:
                        continue
                    first = False
                else:
                    left.remove(name)
                yield name, found
        if process.returncode and not started:
            raise SystemExit(f"{python} cannot run {library}")
        if left:
            yield left.pop(0), {"error": f"the process ended with status {process.returncode}"}


def wrong(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Where a plan is unsound, or has fewer channels than a peer that keeps the function."""
    found = []
    for name, row in rows.items():
        own = row[OURS]
        if not own.get("sound"):
            found.append(f"{name}: {OURS} {cell(own)}")
            continue
        for library, other in row.items():
            if library in (OURS, *NO_SCALES) or not other.get("sound"):
                continue
            if other["independent"] > own["channels"]:
                found.append(f"{name}: {library} finds more, {cell(other)}, {OURS} {cell(own)}")
    return found


def cell(found: dict[str, Any] | None, with_change: bool = True) -> str:
    """ "regions/channels, seconds, change" of one library and model, or its error."""
    if found is None or "error" in found:
        return "" if found is None else str(found["error"])
    channels = f"{found['channels']:,}"
    if found["independent"] not in (None, found["channels"]):
        channels += f" ({found['independent']:,} independent)"
    shown = with_change and found["change"] is not None
    change = f", {found['change']:.0e}" if shown else ""
    return f"{found['regions']}/{channels}, {found['seconds']:.1f} s{change}"


def show(console: Console, rows: dict[str, dict[str, Any]], libraries: list[str]) -> None:
    """Print the table: a row for each model, a column for each library."""
    table = Table("model", *libraries)
    for name, row in rows.items():
        table.add_row(name, *(cell(row.get(library)) for library in libraries))
    console.print(table)


def markdown(record: dict[str, Any]) -> str:
    """The same in Markdown, without errors' words; a row of the largest changes at the end."""
    versions, rows = record["versions"], record["models"]
    heads = [f"{name} {version}" for name, version in versions.items()]
    lines = ["| model | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for name, row in rows.items():
        cells = ["error" if "error" in row[x] else cell(row[x], False) for x in versions]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    changes = [
        [row[x]["change"] for row in rows.values() if row[x].get("change") is not None]
        for x in versions
    ]
    largest = " | ".join(f"{max(found):.0e}" if found else "" for found in changes)
    return "\n".join([*lines, f"| largest change | {largest} |"])


if __name__ == "__main__":
    sys.exit(main())
