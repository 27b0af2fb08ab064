"""Three trained networks of facenet-pytorch through `enorm-fx balance`.

    pip download --no-deps facenet-pytorch==2.5.3
    python -m benchmarks.facenet --wheel FILE

PNet, RNet and ONet detect faces; the wheel brings their weights. Each is balanced by one command
(p = inf and p = 2), which verifies it. Then: signal to quantization noise in dB of the weights,
one scale for a tensor, and of the outputs on random images (the wheel brings no faces). Writes
facenet.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import runpy
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._environment import RESULTS, environment, write_json
from benchmarks.quantize.quantizers import LAYERS, SETTINGS, quantized

SIZES = {"PNet": 12, "RNet": 24, "ONet": 48}  # of the images that they are trained for
SEED, IMAGES = 0, 256
BITS = {"int8": "W8 tensor", "int4": "W4 tensor"}
TARGET = "facenet_networks.py"
# Importing the package itself would ask for what downloads other weights.
SOURCE = """
import sys, types
package = sys.modules["facenet_pytorch"] = types.ModuleType("facenet_pytorch")
package.__path__ = [{package!r}]
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet
"""
POWERS = ("inf", "2")


def main(argv: Sequence[str] | None = None) -> int:
    """Balance, measure, write the JSON and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.facenet", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS / "facenet.json")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zipfile.ZipFile(options.wheel).extractall(folder)
        target = folder / TARGET
        target.write_text(SOURCE.format(package=str(folder / "facenet_pytorch")), encoding="utf-8")
        weights = {net: folder / f"facenet_pytorch/data/{net.lower()}.pt" for net in SIZES}
        networks = {net: examine(target, net, weights[net], SIZES[net]) for net in SIZES}
    record = {
        "environment": environment(torch.device("cpu"), SEED),
        "wheel": options.wheel.name,
        "images": IMAGES,
        "networks": networks,
    }
    write_json(options.output, record)
    print(table(record))
    return 0


def examine(target: Path, network: str, weights: Path, size: int) -> dict[str, Any]:
    """What the command says of one network, and its noise before and after."""
    model: nn.Module = runpy.run_path(str(target))[network](pretrained=False)
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(SEED)
    images = 2 * torch.rand(IMAGES, 3, size, size, generator=generator) - 1
    model.load_state_dict(torch.load(weights, weights_only=True))
    expected = model(images)
    record: dict[str, Any] = {"as trained": noise(model, images, expected)}
    for p in POWERS:
        output = weights.with_name(f"{weights.stem}-{p}.pt")
        command = [
            sys.executable, "-m", "enorm_fx", "balance", f"{target}:{network}", "--arg",
            "pretrained=False", "--input", f"1,3,{size},{size}", "--checkpoint", str(weights),
            "--output", str(output), "--p", p, "--json",
        ]  # fmt: skip
        said = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        balanced = copy.deepcopy(model)
        balanced.load_state_dict(torch.load(output, weights_only=True))
        record[f"p = {p}"] = {
            "norm_before": said["norm_before"],
            "norm_after": said["norm_after"],
            "scales": said["scales"],
            "largest_factor": said["largest_factor"],
            "float64_change": said["verified"]["float64_change"],
            **noise(balanced, images, expected),
        }
    return record


def noise(model: nn.Module, images: Tensor, expected: Sequence[Tensor]) -> dict[str, Any]:
    """By number of bits the signal to noise of each weight and of each output, in dB."""
    layers = [name for name, m in model.named_modules() if isinstance(m, LAYERS)]
    found: dict[str, Any] = {}
    for bits, setting in BITS.items():
        rounded = quantized(model, SETTINGS[setting], images)
        found[bits] = {
            "weights": {
                name: decibels(
                    model.get_parameter(f"{name}.weight"), rounded.get_parameter(f"{name}.weight")
                )
                for name in layers
            },
            "outputs": [decibels(a, b) for a, b in zip(expected, rounded(images), strict=True)],
        }
    return found


def decibels(signal: Tensor, noisy: Tensor) -> float:
    """10 log10 of the energy of the signal over that of the difference."""
    signal, noisy = signal.double(), noisy.double()
    return 10 * math.log10(float(signal.square().sum() / (noisy - signal).square().sum()))


def table(record: Mapping[str, Any]) -> str:
    """A table in Markdown: of the weights the mean (the worst), of the outputs the worst."""
    lines = [
        "| network | | scales | norm | change in float64 | int8, weights | int8, outputs "
        "| int4, weights | int4, outputs |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for network, states in record["networks"].items():
        for state, found in states.items():
            cells = ["", "", ""]
            if "scales" in found:
                cells = [
                    str(found["scales"]),
                    f"{found['norm_before']:.4g} to {found['norm_after']:.4g}",
                    f"{found['float64_change']:.0e}",
                ]
            for bits in BITS:
                weights = list(found[bits]["weights"].values())
                cells.append(f"{sum(weights) / len(weights):.1f} ({min(weights):.1f})")
                cells.append(f"{min(found[bits]['outputs']):.1f}")
            lines.append(f"| {network} | {state} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
