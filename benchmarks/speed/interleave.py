"""Contenders that take turns under one clock, so that a busy machine is busy for all of them."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP = 3
WARM_UP_SECONDS = 1.0
LEAST_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Contender:
    """What is timed, and what runs untimed before each timing, to leave the caches as in use."""

    name: str
    run: Callable[[], object]
    before: Callable[[], object] | None = None


def interleave(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    budget: float,
    rng: random.Random,
    device: torch.device,
) -> dict[str, list[float]]:
    """Seconds by contender: every round times each of them once, in an order drawn anew.

    Untimed rounds come first: one, and up to three if these are short.

    rounds: at most so many. budget: seconds after which no further round begins, once there are
    `LEAST_ROUNDS` (or `rounds`, if fewer).
    """
    begin = time.perf_counter()
    for number in range(WARM_UP):
        if number and time.perf_counter() - begin > WARM_UP_SECONDS:
            break
        for contender in contenders:
            _prepare(contender)
            contender.run()
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    collects = gc.isenabled()
    gc.collect()
    gc.disable()  # as timeit does: a collection would hit one contender by chance
    begin = time.perf_counter()
    try:
        for number in range(rounds):
            if number >= LEAST_ROUNDS and time.perf_counter() - begin > budget:
                break
            for contender in rng.sample(list(contenders), len(contenders)):
                _prepare(contender)
                seconds[contender.name].append(timed(contender.run, device))
    finally:
        if collects:
            gc.enable()
    return seconds


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call. On CUDA: between two events, on a device that has nothing else to do.

    The device waits for the first launch and the gaps between launches count, as they do
    where a step is bound by launches.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        first.record()
        run()
        last.record()
        last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and fastest, in the unit of the values."""
    q1, median, q3 = values[0], values[0], values[0]
    if len(values) > 1:
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "fastest": min(values), "rounds": len(values)}


def kernel_launches(run: Callable[[], object], device: torch.device) -> int | None:
    """How many kernels one call starts on a GPU (copies and fills aside); None on a CPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    kernels = [
        event
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA"
        and not event.is_user_annotation  # "Optimizer.step#SGD.step", shown on the device too
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return len(kernels)


def _prepare(contender: Contender) -> None:
    if contender.before is not None:
        contender.before()
