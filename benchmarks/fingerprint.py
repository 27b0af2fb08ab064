"""Are fingerprints equal for all rescalings, and different after a change?

    python -m benchmarks.fingerprint [--trials N] [--out FILE]

Every small model and every network of the tests' zoo is rescaled at random, N times from the same
weights (log scales from N(0, 2)), and the distance of each to the first fingerprint is taken. Then
one weight, of typical size and in the largest parameter, is multiplied by 1 + x. In float64 and in
float32. Distances are in units of rounding; fingerprints are equal up to 8.

Prints a line for each type and writes the JSON. The exit status is 1 if a rescaling is taken for a
change, or a change of 1e-4 for a rescaling.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._environment import RESULTS, environment, write_json
from enorm_fx import analyze, fingerprint
from tests.support.zoo_networks import NETWORKS, built
from tests.support.zoo_small import ZOO

SPREAD = 2.0
CHANGES = (1e-3, 1e-4, 1e-5)
EQUAL = 8.0


def models(dtype: torch.dtype) -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    """Every model of the zoo with its inputs; integers stay such."""
    pairs = [(small.name, small.build(), small.inputs()) for small in ZOO]
    pairs += [(name, copy.deepcopy(built(name)[0]), built(name)[1]) for name in NETWORKS]
    for name, model, inputs in pairs:
        cast = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
        yield name, model.to(dtype), cast


def distances(
    model: nn.Module, inputs: tuple[Tensor, ...], trials: int
) -> tuple[list[float], dict[float, float]]:
    """Of rescalings, and by x of a weight that is multiplied by 1 + x. The model stays."""
    first = fingerprint(model, inputs)
    plan = analyze(model, inputs, batchnorm="affine", frozen="rescale")
    old = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    rescaled = []
    for _ in range(trials):
        u = torch.randn(plan.num_scales, generator=generator, dtype=torch.float64)
        plan.rescale_(SPREAD * u)
        rescaled.append(first.distance(fingerprint(model, inputs)))
        model.load_state_dict(old)
    changed = {}
    largest = max(model.parameters(), key=Tensor.numel)
    typical = float(largest.detach().square().mean().sqrt())
    at = int((largest.detach().abs() - typical).abs().argmin())
    for x in CHANGES:
        with torch.no_grad():
            largest.view(-1)[at] *= 1 + x
        changed[x] = first.distance(fingerprint(model, inputs))
        model.load_state_dict(old)
    return rescaled, changed


def measure(dtype: torch.dtype, trials: int) -> dict[str, Any]:
    """What the JSON says of a type."""
    rescaled: list[float] = []
    changed: dict[float, list[float]] = {x: [] for x in CHANGES}
    count = 0
    for _, model, inputs in models(dtype):
        ours, theirs = distances(model, inputs, trials)
        count += 1
        rescaled += ours
        for x, distance in theirs.items():
            changed[x].append(distance)
    return {
        "models": count,
        "rescalings": len(rescaled),
        "median_distance": statistics.median(rescaled),
        "largest_distance": max(rescaled),
        "taken_for_changes": sum(d > EQUAL for d in rescaled),
        "smallest_distance_of_changes": {f"{x:g}": min(d) for x, d in changed.items()},
        "changes_not_seen": {f"{x:g}": sum(v <= EQUAL for v in d) for x, d in changed.items()},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fingerprint", description=__doc__)
    parser.add_argument("--trials", type=int, default=10, help="rescalings of each model")
    parser.add_argument("--out", type=Path, default=RESULTS / "fingerprint.json")
    options = parser.parse_args(argv)
    found = {}
    for dtype in (torch.float64, torch.float32):
        found[str(dtype)] = row = measure(dtype, options.trials)
        print(
            f"{dtype}: {row['rescalings']} rescalings of {row['models']} models, distance at most "
            f"{row['largest_distance']:.2f}; of a weight changed by a relative 1e-4 at least "
            f"{row['smallest_distance_of_changes']['0.0001']:.3g}"
        )
    where = environment(torch.device("cpu"), 0)
    write_json(options.out, {"environment": where, "equal_up_to": EQUAL, "types": found})
    bad = any(r["taken_for_changes"] or r["changes_not_seen"]["0.0001"] for r in found.values())
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
