"""How far rounding alone moves an accuracy: `python -m benchmarks.quantize.rounding --cache DIR`.

The mobilenet of `benchmarks.quantize`, trained from several seeds, equalized by each method and
quantized in 4 bits with one scale for a tensor: as it comes from the method, and after small random
rescalings of its units (the same function, ranges as good to a few percent, every weight rounded
anew). `--peer brevitas=PYTHON` adds brevitas's EqualizeGraph. Writes quantize-rounding.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import enorm_fx
from benchmarks._environment import environment, write_json
from benchmarks.data import load
from benchmarks.quantize.methods import applied
from benchmarks.quantize.options import CALIBRATION, add_options, peers_of
from benchmarks.quantize.quantizers import SETTINGS, quantized
from benchmarks.quantize.table import spread
from benchmarks.quantize.training import accuracy, trained

NETWORK, SETTING = "mobilenet", "W4 tensor"
METHODS = ("pairwise", "ours, p = inf", "ours, p = 2")
DEVIATION = 0.02  # of the log scale of a unit


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, write the JSON and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize.rounding")
    parser.add_argument("--trainings", type=int, default=5)
    parser.add_argument("--roundings", type=int, default=10)
    add_options(parser, "quantize-rounding.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    peers = peers_of(parser, options)
    data = load("fashion-mnist", options.data, torch.device("cpu"))
    images, labels = data.test_images[: options.images], data.test_labels[: options.images]
    calibration = data.train_images[:CALIBRATION]
    trainings = []
    for seed in range(options.trainings):
        model = trained(NETWORK, seed, data, options.cache)
        found: dict[str, Any] = {"float": accuracy(model, images, labels), "methods": {}}
        for method in (*METHODS, *peers):
            (done,) = applied(
                method, NETWORK, [model], calibration, peers.get(method, sys.executable)
            )
            found["methods"][method] = [
                accuracy(quantized(start, SETTINGS[SETTING], calibration), images, labels)
                for start in (done, *moved(done, calibration, options.roundings))
            ]
        trainings.append(found)
    record = {
        "environment": environment(torch.device("cpu"), 0),
        "network": NETWORK, "setting": SETTING, "test_images": options.images,
        "deviation": DEVIATION, "trainings": trainings,
    }  # fmt: skip
    write_json(options.output, record)
    print(table(record))
    return 0


def moved(model: nn.Sequential, calibration: Tensor, count: int) -> list[nn.Sequential]:
    """Copies of which each unit is scaled a little."""
    copies = []
    for seed in range(count):
        copied = copy.deepcopy(model)
        plan = enorm_fx.analyze(copied, calibration[:2], frozen="rescale")
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(plan.num_scales, generator=generator, dtype=torch.float64)
        plan.rescale_(DEVIATION * noise)
        copies.append(copied)
    return copies


def table(record: Mapping[str, Any]) -> str:
    """Percent: what the method gives, then mean and deviation over the roundings."""
    names = list(record["trainings"][0]["methods"])
    lines = [
        "| training | float | " + " | ".join(names) + " |",
        "| --- | ---: " + "| ---: " * len(names) + "|",
    ]
    for number, found in enumerate(record["trainings"]):
        cells = [spread([found["float"]])]
        for name in names:
            first, *others = found["methods"][name]
            cells.append(f"{spread([first])}; {spread(others)}")
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    means = [
        [statistics.mean(found["methods"][name][part]) for found in record["trainings"]]
        for name in names
        for part in (slice(1), slice(1, None))
    ]
    pairs = zip(means[::2], means[1::2], strict=True)
    cells = [f"{spread(first)}; {spread(others)}" for first, others in pairs]
    floats = spread([found["float"] for found in record["trainings"]])
    lines.append(f"| all | {floats} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
