"""brevitas's EqualizeGraph on one network, for `benchmarks.quantize`, by a Python that has it."""

from __future__ import annotations

import argparse
import sys
import warnings

import torch
from safetensors.torch import load_file, save_file

from benchmarks.quantize.networks import build, fold_

ITERATIONS = 20  # what brevitas's own preparation for quantization uses


def main(argv: list[str] | None = None) -> int:
    """Equalize the weights in each file, and write them in its place under the same names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize.peer")
    parser.add_argument("network")
    parser.add_argument("paths", nargs="+")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the other library
    from brevitas.fx import symbolic_trace
    from brevitas.graph.equalize import EqualizeGraph

    for path in options.paths:
        model = fold_(build(options.network, 0))
        model.load_state_dict(load_file(path))
        names = model.state_dict().keys()
        graph = EqualizeGraph(iterations=ITERATIONS).apply(symbolic_trace(model))
        state = graph.state_dict()
        save_file({name: state[name].contiguous() for name in names}, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
