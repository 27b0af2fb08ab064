"""What a call costs beside its native code: looking at what has changed, above all.

    python -m benchmarks.speed.around [--rounds 1000]

On the network with the most parameters for its size (50 layers of 64), with SGD with momentum and
AdamW, unfused (`enorm.step()`) and fused (`optimizer.step()`): seconds of a call, those inside
compiled code, and the rest. Each once as it is, and once with tensors and dictionaries asked by
methods of torch and Python, as where there is no DLPack interface. All take their turns in an
order that is drawn anew in every round. One thread; the learning rate is 0.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import enorm_fx
from benchmarks._environment import RESULTS, environment, write_json
from benchmarks.speed.fused import OPTIMIZERS
from benchmarks.speed.networks import Network, networks
from enorm_fx import ENorm
from enorm_fx.step.fused import native as fused
from enorm_fx.step.native import backend, places
from enorm_fx.step.native.compiler import load
from enorm_fx.step.native.pack import Unsupported

NETWORK = "MLP 50 x 64"
_WARM_UP = 50


class Timed:
    """The compiled library, and the seconds that calls of its functions have taken."""

    def __init__(self) -> None:
        self._library, self.seconds = load(), 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, name)

        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


@contextmanager
def _asking(natively: bool) -> Iterator[None]:
    """How guards that are made meanwhile ask."""
    if natively:
        yield
        return
    error = Unsupported("for comparison")
    with (
        mock.patch.object(places, "_interface", side_effect=error),
        mock.patch.object(places, "_library", side_effect=error),
    ):
        yield


def call(
    network: Network, optimizer: str, inside: bool, natively: bool
) -> Callable[[], tuple[float, float]]:
    """A call that is timed: seconds of all of it, and of compiled code. inside: fused."""
    torch.manual_seed(0)
    model = network.build(network.own).train()
    made = OPTIMIZERS[optimizer](model)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    plan = enorm_fx.analyze(model, network.inputs(torch.device("cpu")))
    library = Timed()
    with (
        mock.patch.object(backend, "load", return_value=library),
        mock.patch.object(fused, "load", return_value=library),
        _asking(natively),
    ):
        enorm = ENorm(plan, made, start="as_is", backend="native", fused=inside)
        made.step()
        run = made.step if inside else enorm.step
        run()

    def timed() -> tuple[float, float]:
        library.seconds, begin = 0.0, time.perf_counter()
        run()
        return time.perf_counter() - begin, library.seconds

    return timed


def costs(network: Network, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Medians over the rounds, in seconds."""
    rows: list[dict[str, Any]] = [
        {"optimizer": optimizer, "fused": inside, "natively": natively}
        for optimizer in OPTIMIZERS
        for inside in (False, True)
        for natively in (True, False)
    ]
    calls = [call(network, r["optimizer"], r["fused"], r["natively"]) for r in rows]
    found: list[list[tuple[float, float]]] = [[] for _ in rows]
    draw = random.Random(seed)
    for turn in range(_WARM_UP + rounds):
        for number in draw.sample(range(len(rows)), len(rows)):
            pair = calls[number]()
            if turn >= _WARM_UP:
                found[number].append(pair)
    for row, pairs in zip(rows, found, strict=True):
        row["call"] = statistics.median(whole for whole, _ in pairs)
        row["compiled"] = statistics.median(part for _, part in pairs)
        row["around"] = statistics.median(whole - part for whole, part in pairs)
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, in microseconds."""
    lines = [
        "| optimizer | | asked | call | compiled | around |",
        "| --- " * 3 + "| ---: " * 3 + "|",
    ]
    for row in rows:
        cells = [row["optimizer"], "fused" if row["fused"] else "unfused"]
        cells.append("natively" if row["natively"] else "by methods")
        cells += [f"{1e6 * row[key]:.0f}" for key in ("call", "compiled", "around")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write JSON, print the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.around")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed_around.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = costs(networks()[NETWORK], options.rounds, options.seed)
    write_json(options.out, {
        "benchmark": "speed.around",
        "environment": environment(torch.device("cpu"), options.seed),
        "network": NETWORK,
        "rounds": options.rounds,
        "unit": "seconds",
        "rows": rows,
    })  # fmt: skip
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
