"""What is done to a trained network before it is quantized; each keeps its function."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import enorm_fx
from benchmarks.quantize.networks import Weighted, neighbours

ROUNDS = 200  # of pairwise equalization; chains settle well before


def rescaled(model: nn.Sequential, example: Tensor, seed: int) -> nn.Sequential:
    """A copy, every unit of it scaled by e^N(0, 1): another network of the same function."""
    copied = copy.deepcopy(model)
    plan = enorm_fx.analyze(copied, example, frozen="rescale")
    generator = torch.Generator().manual_seed(seed)
    plan.rescale_(torch.randn(plan.num_scales, generator=generator, dtype=torch.float64))
    return copied


@torch.no_grad()
def pairwise_(pairs: Sequence[tuple[Weighted, Weighted]]) -> None:
    """Cross-layer equalization, pair by pair in turns until nothing moves.

    For each channel the largest |w| that enters it and the largest that leaves it become equal:
    s = sqrt(r1 / r2) (Nagel et al. 2019, arXiv:1906.04721).
    """
    for _ in range(ROUNDS):
        largest = 0.0
        for producer, consumer in pairs:
            entering, leaving = _entering(producer), _leaving(consumer)
            s = (entering / leaving).sqrt()
            s[(entering == 0) | (leaving == 0)] = 1.0
            for parameter in producer.parameters():
                parameter.div_(s.reshape(-1, *[1] * (parameter.dim() - 1)))
            depthwise = getattr(consumer, "groups", 1) != 1
            axes = [1] * consumer.weight.dim()
            axes[0 if depthwise else 1] = -1
            consumer.weight.mul_(s.reshape(axes))
            largest = max(largest, float(s.log().abs().max()))
        if largest < 1e-4:
            return


def _entering(layer: Weighted) -> Tensor:
    """The largest |w| of each output channel."""
    return layer.weight.abs().flatten(1).amax(1)


def _leaving(layer: Weighted) -> Tensor:
    """The largest |w| that reads each input channel."""
    if getattr(layer, "groups", 1) != 1:  # depthwise: channel c is read by filter c alone
        return _entering(layer)
    return layer.weight.abs().transpose(0, 1).flatten(1).amax(1)


def _plan(model: nn.Sequential, calibration: Tensor) -> enorm_fx.Plan:
    return enorm_fx.analyze(model, calibration[:2], frozen="rescale")


def _pairwise(model: nn.Sequential, calibration: Tensor) -> None:
    pairwise_(neighbours(model))


def _largest(model: nn.Sequential, calibration: Tensor) -> None:
    enorm_fx.balance(_plan(model, calibration), p=math.inf)


def _squares(model: nn.Sequential, calibration: Tensor) -> None:
    enorm_fx.balance(_plan(model, calibration), p=2)


def _smooth(model: nn.Sequential, calibration: Tensor) -> None:
    enorm_fx.smooth(_plan(model, calibration), list(calibration.split(128)))


METHODS: dict[str, Callable[[nn.Sequential, Tensor], None]] = {
    "plain": lambda model, calibration: None,
    "pairwise": _pairwise,
    "ours, p = inf": _largest,
    "ours, p = 2": _squares,
    "ours, smooth": _smooth,
}
PEERS = ("brevitas",)


def applied(
    method: str, name: str, models: Sequence[nn.Sequential], calibration: Tensor,
    python: str = sys.executable,
) -> list[nn.Sequential]:  # fmt: skip
    """Copies after a method; a peer's runs in a process of its own, by a Python that has it."""
    copies = [copy.deepcopy(model) for model in models]
    if method not in PEERS:
        for copied in copies:
            METHODS[method](copied, calibration)
        return copies
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i}.safetensors") for i in range(len(copies))]
        for copied, path in zip(copies, paths, strict=True):
            save_file(copied.state_dict(), path)
        command = [python, "-m", "benchmarks.quantize.peer", name, *map(str, paths)]
        subprocess.run(command, check=True, capture_output=True)
        for copied, path in zip(copies, paths, strict=True):
            copied.load_state_dict(load_file(path))
    return copies
