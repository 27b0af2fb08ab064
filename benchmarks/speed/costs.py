"""What a step costs, and what it is in a training step: for `python -m benchmarks.speed`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.speed.bench import OURS, Bench, try_enorm
from benchmarks.speed.interleave import Contender, kernel_launches, summary
from benchmarks.speed.networks import Network, describe, set_up
from benchmarks.speed.plain_loop import PlainLoop
from enorm_fx import ENorm

_BYTES = 4  # of a float32


def step_costs(network: Network, bench: Bench, bandwidth: Mapping[str, float]) -> dict[str, Any]:
    """One cycle on every backend, the fused SGD step, the plain loop and the floor.

    As in training, each follows another's pass over the same tensors: the SGD step runs untimed
    before each ENorm and each loop, an ENorm before the SGD step. The flat passes, on tensors
    of their own, follow themselves.
    """
    setup, plan = bench.set_up(network, network.own)
    skipped: dict[str, str] = {}
    usual = ENorm(plan, setup.optimizer, backend=bench.usual, **OURS)
    usual.step()
    enorms = {
        name: enorm
        for name in bench.backends
        if (enorm := try_enorm(plan, setup.optimizer, skipped, name, backend=name))
    }
    loop = PlainLoop(plan, setup.optimizer)
    moved, measured = loop.moved()
    sgd = setup.optimizer.step
    flat = flat_passes(moved, bench.device)
    contenders = [
        Contender("sgd", sgd, usual.step),
        *(Contender(name, enorm.step, sgd) for name, enorm in enorms.items()),
        Contender("loop", loop.step, sgd),
        Contender("flat", flat, flat),
    ]
    seconds = bench.measure(contenders)
    auto = usual.backend
    least = floor(moved, measured, bandwidth)
    if auto in seconds:
        step, bare = statistics.median(seconds[auto]), statistics.median(seconds["flat"])
        least["step_over_flat"] = step / bare
        least["step_over_reading_twice"] = step / max(least["seconds_reading_twice"], 1e-12)
    return {
        **describe(network, setup, plan),
        "auto": auto,
        "contenders": {c.name: _entry(c, seconds[c.name], bench) for c in contenders},
        "ratios": ratios(seconds, "sgd"),
        "skipped": skipped,
        "floor": least,
    }


def median_visit(visits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The visit whose ratio of step to fused SGD is the median (of an even number, the higher one);
    beside it, under "visits", the ratios of all."""
    ordered = sorted(visits, key=lambda visit: visit["ratios"].get(visit["auto"], math.inf))
    return {**ordered[len(ordered) // 2], "visits": [visit["ratios"] for visit in visits]}


def floor(moved: int, measured: int, bandwidth: Mapping[str, float]) -> dict[str, Any]:
    """What the memory must do: weights and momentum read and written, and the weights measured.

    Measuring is a second read ("reading twice") unless a weight stays in a cache in between.
    moved, measured: entries of weights. bandwidth: of `bandwidths`.
    """
    applied, read = 4 * moved * _BYTES, measured * _BYTES
    once = applied / bandwidth["scale"]
    return {
        "moved": moved,
        "measured": measured,
        "bytes_reading_once": applied,
        "bytes_reading_twice": applied + read,
        "seconds_reading_once": once,
        "seconds_reading_twice": once + read / bandwidth["read"],
    }


def _entry(contender: Contender, seconds: Sequence[float], bench: Bench) -> dict[str, Any]:
    launches = kernel_launches(contender.run, bench.device)
    return summary(seconds) if launches is None else {**summary(seconds), "launches": launches}


def ratios(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, float]:
    """Medians over the base's median."""
    below = statistics.median(seconds[base])
    return {name: statistics.median(s) / below for name, s in seconds.items() if name != base}


def flat_passes(entries: int, device: torch.device) -> Callable[[], object]:
    """The least that a step does to its data, by torch's kernels, without layers or layouts.

    On one flat tensor of all weights and one of all momentum: a read of the weights and two
    multiplications in place. Caches are as warm as they get, so where a network fits into them
    this is below what bytes over the memory's bandwidth give.
    """
    weight = torch.randn(max(1, entries), device=device)
    momentum = torch.randn_like(weight)

    def run() -> None:
        torch.dot(weight, weight)
        weight.mul_(1.0)
        momentum.mul_(1.0)

    return run


def bandwidths(bench: Bench, entries: int = 64 * 2**20) -> dict[str, float]:
    """Bytes a second that torch's kernels move on arrays far larger than a cache.

    "read" by dot, "scale" in place by mul_ (read and written), "copy" by copy_, "add" by add_.
    """
    a, b = torch.ones(entries, device=bench.device), torch.ones(entries, device=bench.device)
    passes: dict[str, tuple[int, Callable[[], object]]] = {
        "read": (2, lambda: torch.dot(a, b)),
        "scale": (2, lambda: a.mul_(1.0)),
        "copy": (2, lambda: a.copy_(b)),
        "add": (3, lambda: a.add_(b, alpha=0.0)),
    }
    seconds = bench.measure([Contender(name, run) for name, (_, run) in passes.items()])
    size = entries * _BYTES
    return {n: passes[n][0] * size / statistics.median(s) for n, s in seconds.items()}


# ---- a training step ----


def training_costs(network: Network, bench: Bench) -> dict[str, Any]:
    """Forward, backward and SGD with each kind of normalization, and ENorm after such a step.

    "adds": what BatchNorm, GroupNorm and ENorm add, by the median of the rounds' differences for
    the former two; "base" is the training step without any of them (or the network's own).

    Keep rounds in the low hundreds: the momentum of dead units falls by a tenth each step, and
    after some 700 it would be denormal, and slow.
    """
    bench.release()
    torch.manual_seed(bench.seed)
    setups = {norm: set_up(network, norm, bench.device) for norm in network.norms}
    own = setups[network.own]
    enorm = ENorm(own.analyze(), own.optimizer, backend=bench.usual, **OURS)
    contenders = [Contender(f"train {norm}", setup.train_step) for norm, setup in setups.items()]
    seconds = bench.measure([*contenders, Contender("enorm", enorm.step, own.train_step)])
    base = "none" if "none" in setups else network.own
    adds = {
        norm: statistics.median(
            b - a for a, b in zip(seconds[f"train {base}"], seconds[f"train {norm}"], strict=True)
        )
        for norm in setups
        if norm != base
    }
    adds["enorm"] = statistics.median(seconds["enorm"])
    below = statistics.median(seconds[f"train {base}"])
    return {
        "batch": list(network.shape),
        "own": network.own,
        "base": base,
        "backend": enorm.backend,
        "contenders": {name: summary(values) for name, values in seconds.items()},
        "adds": adds,
        "adds_share_of_base": {name: value / below for name, value in adds.items()},
        "enorm_share": adds["enorm"] / statistics.median(seconds[f"train {network.own}"]),
    }
