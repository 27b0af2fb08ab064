"""How well networks quantize, before and after equalization: `python -m benchmarks.quantize`.

Five small networks are trained on Fashion-MNIST, BatchNorm is folded, and each is quantized as
trained and after random rescalings of its units, which keep its function; plain, and after each
method of `methods`. `--peer brevitas=PYTHON` adds brevitas's EqualizeGraph. Each network is trained
once; a seed draws a rescaling. Trained weights and finished records stay under `--cache`, so that a
run that is stopped goes on. Writes quantize.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._environment import environment, write_json
from benchmarks.data import Dataset, load
from benchmarks.quantize import training
from benchmarks.quantize.methods import METHODS, applied, rescaled
from benchmarks.quantize.networks import BUILDERS
from benchmarks.quantize.options import CALIBRATION, add_options, peers_of
from benchmarks.quantize.quantizers import SETTINGS, quantized
from benchmarks.quantize.table import AS_TRAINED, RESCALED, table
from benchmarks.quantize.training import accuracy, trained

TRAINED = 0  # the seed of the first weights and of the order of the images


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, write the JSON and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="rescalings")
    parser.add_argument("--only", nargs="*", choices=BUILDERS, metavar="NETWORK")
    add_options(parser, "quantize.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    peers = peers_of(parser, options)
    data = load("fashion-mnist", options.data, torch.device("cpu"))
    records = [_kept(name, data, peers, options) for name in options.only or BUILDERS]
    record = {
        "environment": environment(torch.device("cpu"), 0),
        "rescalings": options.seeds,
        "test_images": options.images,
        "calibration_images": CALIBRATION,
        "records": records,
    }
    write_json(options.output, record)
    print(table(record))
    return 0


def _kept(
    name: str, data: Dataset, peers: dict[str, str], options: argparse.Namespace
) -> dict[str, Any]:
    """The record of one network, from the cache if it is finished."""
    path = options.cache / f"{name}-{options.seeds}-{options.images}-{'-'.join(peers)}.json"
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    model = trained(name, TRAINED, data, options.cache)
    images, labels = data.test_images[: options.images], data.test_labels[: options.images]
    calibration = data.train_images[:CALIBRATION]
    starts = {AS_TRAINED: [model]}
    starts[RESCALED] = [rescaled(model, calibration[:2], seed) for seed in range(options.seeds)]
    record: dict[str, Any] = {
        "network": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": training.EPOCHS[name],
        "float": accuracy(model, images, labels),
        "quantized": {state: {} for state in starts},
    }
    for state, models in starts.items():
        for method in (*METHODS, *peers):
            python = peers.get(method, sys.executable)
            record["quantized"][state][method] = [
                measure(done, calibration, images, labels)
                for done in applied(method, name, models, calibration, python)
            ]
    write_json(path, record)
    return record


def measure(
    model: nn.Module, calibration: Tensor, images: Tensor, labels: Tensor
) -> dict[str, float]:
    """Accuracy in float and with every setting of the quantization."""
    found = {"float": accuracy(model, images, labels)}
    for name, setting in SETTINGS.items():
        found[name] = accuracy(quantized(model, setting, calibration), images, labels)
    return found


if __name__ == "__main__":
    sys.exit(main())
