"""How many BatchNorms are folded, and is the function kept: `python -m benchmarks.folding`.

For models of torchvision that have BatchNorm, with random weights and statistics as of a trained
network: how many are folded into the layer before them, why the others are left alone, seconds, and
the largest relative change of the outputs in float64, after folding and after the folded model is
balanced and put back into one of the same class. Status 1 if a change is more than rounding.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import enorm_fx
from benchmarks._environment import RESULTS, environment, write_json
from benchmarks.zoo import models, raw_heads
from enorm_fx.tracing.inputs import as_call
from enorm_fx.verifying import in_double, outputs_in_double, relative_change

EXACT = 1e-11  # largest relative change in float64 that is rounding
MODELS = (
    "resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2",
    "mobilenet_v3_small", "mnasnet1_0", "shufflenet_v2_x1_0", "densenet121", "googlenet",
    "inception_v3", "efficientnet_b0", "regnet_y_400mf", "fcn_resnet50", "deeplabv3_resnet50",
    "r3d_18",
)  # fmt: skip


def examine(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Fold a model in evaluation mode, balance it, put the BatchNorms back."""
    model.eval().double()
    # Some models cast to float32 by name; in float64 they cannot run then.
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double), raw_heads(model):
        args, kwargs = in_double(as_call(inputs), torch.Generator(), draw=False)
        before = outputs_in_double(model, args, kwargs)
        begin = time.perf_counter()
        folding = enorm_fx.fold_batchnorm_(model, kwargs or args)
        seconds = time.perf_counter() - begin
        change = relative_change(before, outputs_in_double(model, args, kwargs))
        enorm_fx.balance(model, kwargs or args)
        folding.put_back_()
        after = relative_change(before, outputs_in_double(model, args, kwargs))
    reasons = Counter(re.sub(r"\S*[._]\S*|'\S+'", "...", entry.reason) for entry in folding.left)
    return {
        "folded": len(folding.folded),
        "left": len(folding.left),
        "reasons": dict(reasons),
        "seconds": seconds,
        "change": change,
        "change_put_back": after,
    }


def main(argv: list[str] | None = None) -> int:
    """Examine the models, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.folding", description=__doc__)
    parser.add_argument("--only", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "folding.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    for name, model, inputs in models("torchvision", list(options.only), options.seed):
        rows[name] = examine(model, inputs)
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
    wrong = [
        name for name, row in rows.items()
        if not max(row["change"], row["change_put_back"]) <= EXACT
    ]  # fmt: skip
    record = {
        "environment": environment(torch.device("cpu"), options.seed),
        "folded": sum(row["folded"] for row in rows.values()),
        "left": sum(row["left"] for row in rows.values()),
        "largest_change": max((row["change"] for row in rows.values()), default=0.0),
        "wrong": wrong,
        "models": rows,
    }
    write_json(options.output, record)
    table = Table("model", "folded", "left", "seconds", "change", "put back")
    for name, row in rows.items():
        table.add_row(
            name, str(row["folded"]), str(row["left"]), f"{row['seconds']:.2f}",
            f"{row['change']:.0e}", f"{row['change_put_back']:.0e}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"{len(rows)} models, {record['folded']} folded, {record['left']} left alone")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
