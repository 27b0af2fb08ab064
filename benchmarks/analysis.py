"""How long an analysis takes, after imports, on one core: `python -m benchmarks.analysis`.

Medians of several runs after one that warms torch's caches, on models that are built once. With
transformers installed, Llama's layout (32 layers of width 4096) on the meta device as well, with
the peak of memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torchvision.models import get_model

import enorm_fx
from benchmarks._environment import RESULTS, environment, write_json

_TORCHVISION = ("resnet50", "resnet152", "densenet121", "densenet201", "vit_l_16")


def llama() -> tuple[nn.Module, Any]:
    """32 layers of width 4096, grouped queries, without memory for the weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tokens = torch.zeros((1, 16), dtype=torch.int64, device="meta")
    return model.eval(), {"input_ids": tokens, "use_cache": False}


def measure(build: Callable[[], tuple[nn.Module, Any]], repeats: int) -> dict[str, Any]:
    """Seconds of one first and several further analyses, and what was found."""
    model, inputs = build()
    before = _peak()
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        plan = enorm_fx.analyze(model, inputs, batchnorm="affine")
        seconds.append(time.perf_counter() - begin)
    return {
        "first": seconds[0],
        "median": statistics.median(seconds[1:]),
        "fastest": min(seconds[1:]),
        "slowest": max(seconds[1:]),
        "scales": plan.num_scales,
        "groups": len(plan.groups),
        "peak_growth_mib": (_peak() - before) / 1024,
    }


def _peak() -> float:
    """Peak of resident memory so far, KiB (as Linux counts it)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analysis", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "analysis.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    builders: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
        name: lambda name=name: (get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224))  # type: ignore[misc]
        for name in _TORCHVISION
    }
    if importlib.util.find_spec("transformers"):
        builders["llama 32 x 4096 (meta)"] = llama
    rows = {}
    table = Table("model", "first s", "median s", "scales", "groups", "memory MiB")
    for name, build in builders.items():
        row = rows[name] = measure(build, options.repeats)
        table.add_row(
            name, f"{row['first']:.2f}", f"{row['median']:.2f}", f"{row['scales']:,}",
            str(row["groups"]), f"{row['peak_growth_mib']:.0f}",
        )  # fmt: skip
    Console().print(table)
    record = {"environment": environment(torch.device("cpu"), 0), "repeats": options.repeats}
    write_json(options.output, {**record, "models": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
