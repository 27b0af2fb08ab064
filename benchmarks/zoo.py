"""Which models give a plan, and is every plan sound: `python -m benchmarks.zoo`.

For every model of torchvision (`--suite torchvision`) or a list of transformers with small random
configurations (`--suite transformers`): the front end, groups, scales, blocked sides, seconds of
analysis, and the largest relative change of the outputs under a random rescaling in float64.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import enorm_fx
from benchmarks._environment import RESULTS, environment, write_json

SOUND = 1e-9  # largest relative change in float64 that is rounding


@dataclass(frozen=True, slots=True)
class Row:
    """One model. change is None where there is no plan; error is then one line."""

    model: str
    front_end: str
    groups: int
    scales: int
    blocked: int
    seconds: float
    change: float | None
    error: str = ""
    notes: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        return self.change is not None and self.change <= SOUND


def examine(name: str, model: nn.Module, inputs: Any) -> Row:
    """Analyze a model in evaluation mode and verify the plan."""
    model.eval()
    begin = time.perf_counter()
    try:
        plan = enorm_fx.analyze(model, inputs, batchnorm="affine", frozen="rescale")
        seconds = time.perf_counter() - begin
        # Some models cast to float32 by name; in float64 they cannot run then.
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double), raw_heads(model):
            change = enorm_fx.verify(plan, inputs, trials=1).largest_change
    except enorm_fx.EnormError as error:
        message = " ".join(str(error).split())
        return Row(name, "", 0, 0, 0, time.perf_counter() - begin, None, message)
    return Row(
        name,
        plan.tracer,
        len(plan.groups),
        plan.num_scales,
        len(plan.blocked),
        seconds,
        change,
        notes=plan.notes,
    )


@contextmanager
def raw_heads(model: nn.Module) -> Iterator[None]:
    """One-stage detectors give what their heads give.

    With random weights many scores are exactly equal, and rounding decides the order of the boxes.
    """
    if hasattr(model, "postprocess_detections"):
        identity = mock.patch.object(model.transform, "postprocess", lambda result, *args: result)
        heads = mock.patch.object(
            model, "postprocess_detections", lambda heads, *args: [{"heads": heads}]
        )
        with identity, heads:
            yield
    else:
        yield


def draw_statistics(model: nn.Module) -> None:
    """Running statistics as of a trained model, and parameters that are zero filled in."""
    with torch.no_grad():
        for module in model.modules():
            mean, variance = (getattr(module, f"running_{x}", None) for x in ("mean", "var"))
            if isinstance(mean, torch.Tensor) and isinstance(variance, torch.Tensor):
                mean.normal_(0, 0.1)
                variance.uniform_(0.5, 2)
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.normal_(0, 0.02)


def table(rows: list[Row]) -> Table:
    """The rows as people read them."""
    result = Table("model", "front end", "groups", "scales", "blocked", "seconds", "change")
    for row in rows:
        change = row.error[:60] if row.change is None else f"{row.change:.1e}"
        style = None if row.sound else "bold"
        result.add_row(
            row.model, row.front_end, str(row.groups), f"{row.scales:,}", str(row.blocked),
            f"{row.seconds:.2f}", change, style=style,
        )  # fmt: skip
    return result


def main(argv: list[str] | None = None) -> int:
    """Run a suite, print the table, write the JSON. Status 1 if a plan is unsound."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--suite", choices=("torchvision", "transformers"), default="torchvision")
    parser.add_argument("--only", nargs="*", default=[], help="names of models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    console = Console()
    rows: list[Row] = []
    for name, model, inputs in models(options.suite, options.only, options.seed):
        row = examine(name, model, inputs)
        rows.append(row)
        line = row.error or f"{row.scales} scales, {row.seconds:.2f} s, {row.change:.1e}"
        print(f"{name}: {line}", file=sys.stderr, flush=True)
    console.print(table(rows))
    if options.only:  # the other rows of the file stay
        rows = merged(options.output or RESULTS / f"zoo-{options.suite}.json", rows)
    planned = [row for row in rows if row.change is not None]
    unsound = [row.model for row in planned if not row.sound]
    share = len(planned) / max(len(rows), 1)
    console.print(f"{len(rows)} models, {share:.1%} with a plan, {len(unsound)} unsound {unsound}")
    record = {
        "environment": environment(torch.device("cpu"), options.seed),
        "suite": options.suite,
        "models": len(rows),
        "with_a_plan": len(planned),
        "unsound": unsound,
        "rows": [without_folders(asdict(row)) for row in rows],
    }
    write_json(options.output or RESULTS / f"zoo-{options.suite}.json", record)
    return 1 if unsound else 0


def merged(path: Path, rows: list[Row]) -> list[Row]:
    """The rows of an earlier run with some of them measured anew."""
    if not path.is_file():
        return rows
    anew = {row.model: row for row in rows}
    before = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    known = {row.model for row in before}
    kept = [anew.get(row.model, row) for row in before]
    return kept + [row for row in rows if row.model not in known]


def without_folders(record: dict[str, Any]) -> dict[str, Any]:
    """Source files by their place in a package, wherever it is installed."""
    text = re.sub(r"[^\s'\"]*/site-packages/", "", json.dumps(record))
    shorter: dict[str, Any] = json.loads(text)
    return shorter


def models(suite: str, only: list[str], seed: int) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, model, example inputs) of a suite, each built when its turn comes."""
    if suite == "torchvision":
        from benchmarks.zoo_torchvision import build, names
    else:
        from benchmarks.zoo_transformers import build, names
    for name in only or names():
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, inputs = build(name)
        draw_statistics(model)
        yield name, model, inputs


if __name__ == "__main__":
    sys.exit(main())
