"""How a step's cost depends on settings and on size: for `python -m benchmarks.speed`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import enorm_fx
from benchmarks.speed.bench import REFUSALS, Bench, make_enorm, reason, try_enorm
from benchmarks.speed.interleave import Contender, summary, timed
from benchmarks.speed.networks import Network, stack, with_state

CYCLES = (1, 2, 5, 10)
ORDERS = ("sequential", "colored", "simultaneous")
SIZES = (1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000)
BUILDS = 3


def cycle_costs(network: Network, bench: Bench) -> dict[str, Any]:
    """Steps of 1, 2, 5 and 10 cycles on each backend; ratios to one cycle."""
    settings = {
        f"{backend} {cycles}": {"backend": backend, "cycles": cycles}
        for backend in bench.backends
        for cycles in CYCLES
    }
    result = _variants(network, bench, settings)
    medians = {name: row["median"] for name, row in result["contenders"].items()}
    result["ratios"] = {
        name: median / medians[f"{name.split()[0]} 1"] for name, median in medians.items()
    }
    return result


def order_costs(network: Network, bench: Bench) -> dict[str, Any]:
    """Steps in each order, on the eager backend: what colours save in calls."""
    settings = {order: {"backend": "eager", "order": order} for order in ORDERS}
    return _variants(network, bench, settings)


def _variants(
    network: Network, bench: Bench, settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    setup, plan = bench.set_up(network, network.own)
    skipped: dict[str, str] = {}
    contenders = [
        Contender(name, enorm.step, setup.optimizer.step)
        for name, options in settings.items()
        if (enorm := try_enorm(plan, setup.optimizer, skipped, name, **options))
    ]
    seconds = bench.measure(contenders) if contenders else {}
    return {
        "network": network.name,
        "contenders": {name: summary(values) for name, values in seconds.items()},
        "skipped": skipped,
    }


# ---- size ----


def size_costs(bench: Bench, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Cost per parameter of ENorm (`Bench.usual`) and of SGD as a network grows, interleaved.

    "wider": ten weights, their width grows. "deeper": weights of 500,000 entries, their number
    grows. last_layer=True, so that every weight moves in a network of two.
    """
    bench.release()
    torch.manual_seed(bench.seed)
    contenders: list[Contender] = []
    counts: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for size in sizes:
        for family, model in (
            ("wider", stack(round((size / 10) ** 0.5), 10)),
            ("deeper", stack(707, max(2, round(size / 707**2)))),
        ):
            key = f"{family} {size}"
            model.to(bench.device)
            optimizer = with_state(model)
            width = next(model.parameters()).shape[1]
            plan = enorm_fx.analyze(model, torch.zeros(2, width, device=bench.device))
            enorm = try_enorm(plan, optimizer, skipped, key, last_layer=True, backend=bench.usual)
            if enorm is not None:
                counts[key] = sum(parameter.numel() for parameter in model.parameters())
                contenders.append(Contender(f"enorm {key}", enorm.step, optimizer.step))
                contenders.append(Contender(f"sgd {key}", optimizer.step, enorm.step))
    seconds = bench.measure(contenders)
    rows = [
        {
            "family": key.split()[0],
            "parameters": count,
            "enorm": summary(seconds[f"enorm {key}"]),
            "sgd": summary(seconds[f"sgd {key}"]),
            "enorm_ns_per_parameter": 1e9 * statistics.median(seconds[f"enorm {key}"]) / count,
            "sgd_ns_per_parameter": 1e9 * statistics.median(seconds[f"sgd {key}"]) / count,
        }
        for key, count in counts.items()
    ]
    return {"rows": rows, "skipped": skipped}


# ---- building ----


def build_costs(network: Network, bench: Bench) -> dict[str, Any]:
    """Seconds to build a step: from a plan to the end of the first step, less a later step.

    Each backend three times over; a backend that keeps compiled code on disk or in the process
    shows it from the second time on. Runs before the other measurements for that reason.
    """
    setup, plan = bench.set_up(network, network.own)
    begin = time.perf_counter()
    setup.analyze()
    analysis = time.perf_counter() - begin
    skipped: dict[str, str] = {}
    rows: dict[str, Any] = {}
    for backend in bench.backends:
        values = []
        for _ in range(BUILDS):
            torch.manual_seed(bench.seed)
            begin = time.perf_counter()
            try:
                enorm = make_enorm(plan, setup.optimizer, backend=backend)
                enorm.step()
            except REFUSALS as error:
                skipped[backend] = reason(error)
                break
            bench.synchronize()
            whole = time.perf_counter() - begin
            enorm.step()
            later = statistics.median(timed(enorm.step, bench.device) for _ in range(3))
            values.append(whole - later)
        if values:
            rows[backend] = {"first": values[0], **summary(values)}
    return {"network": network.name, "analysis": analysis, "backends": rows, "skipped": skipped}
