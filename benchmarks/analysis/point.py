"""One point of a curve, in a process of its own: `python -m benchmarks.analysis.point chain 100`.

Prints a line of JSON: seconds of processor time (one thread) and the growth of the peak of memory
while one network is analyzed, after imports and a first analysis of a small one. With `--pass` the
graph pass of another library is measured instead, where that library can be imported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks._memory import peak
from benchmarks.analysis.networks import BUILDERS, WIDTH, build, chain


def ours(model: nn.Module, inputs: Any) -> int:
    """Regions: groups of scales."""
    import enorm_fx

    return len(enorm_fx.analyze(model, inputs, batchnorm="affine").groups)


def brevitas(model: nn.Module, inputs: Any) -> int:
    """Regions that brevitas's equalization finds in a symbolic trace (its own tracer)."""
    from brevitas.fx import symbolic_trace
    from brevitas.graph.equalize import _extract_regions

    return len(_extract_regions(symbolic_trace(model)))


def torch_pruning(model: nn.Module, inputs: Any) -> int:
    """Groups of coupled layers."""
    import torch_pruning

    graph = torch_pruning.DependencyGraph().build_dependency(model, inputs)
    return sum(1 for _ in graph.get_all_groups(root_module_types=[nn.Linear]))


PASSES: Mapping[str, Callable[[nn.Module, Any], int]] = {
    "enorm_fx": ours,
    "brevitas": brevitas,
    "torch-pruning": torch_pruning,
}


def measure(name: str, kind: str, size: int, repeats: int) -> dict[str, Any]:
    """Median of `repeats` runs, each on a network of its own."""
    run = PASSES[name]
    on_meta = name == "enorm_fx"
    small = chain(3)
    run(small, torch.zeros(1, WIDTH))
    seconds = []
    before, regions = peak(), 0
    for _ in range(repeats):
        model, inputs = build(kind, size)
        if not on_meta:  # the others compute
            model, inputs = model.to_empty(device="cpu"), torch.zeros(1, WIDTH)
        begin = time.process_time()
        regions = run(model, inputs)
        seconds.append(time.process_time() - begin)
    return {
        "size": size,
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "peak_growth_mib": (peak() - before) / 2**20,
        "peak_mib": peak() / 2**20,
        "regions": regions,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure one point and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analysis.point")
    parser.add_argument("kind", choices=BUILDERS)
    parser.add_argument("size", type=int)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--pass", dest="name", choices=PASSES, default="enorm_fx")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the other libraries
    print(json.dumps(measure(options.name, options.kind, options.size, options.repeats)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
