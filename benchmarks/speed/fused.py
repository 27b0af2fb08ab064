"""The optimizer alone, the optimizer and then ENorm, both in one pass, and one pass with turns.

    python -m benchmarks.speed.fused [--networks NAME ...] [--visits 5]
    python -m benchmarks.speed.fused --device cuda --backend triton --out FILE

For each network and for SGD with momentum and AdamW (torch's fused steps): one call of
`optimizer.step()` alone, with `enorm.step()` after it, with `fused=True`, and with
`fused=True, order="alternating"`; forward and backward of a batch beside them. Each has a copy of
the network of its own, and copies share gradients. In every round all take their turns in an order
that is drawn anew, so ratios of medians within a visit are what can be compared. Visits of one
network follow one another. The learning rate is 0, so nothing drifts. Plans are exact: BatchNorm is
affine.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import enorm_fx
from benchmarks._environment import RESULTS, environment, write_json
from benchmarks.speed.bench import Bench
from benchmarks.speed.interleave import Contender, summary
from benchmarks.speed.networks import Network, networks
from enorm_fx import ENorm, Plan

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.0, fused=True),
}
TITLES = {
    "alone": "optimizer",
    "unfused": "then ENorm",
    "fused": "fused",
    "alternating": "fused, alternating",
}
_BYTES = 4  # of a float32


def costs(network: Network, name: str, bench: Bench, visits: int, backend: str) -> dict[str, Any]:
    """Seconds of the four contenders and of forward and backward, visit by visit."""
    bench.release()
    torch.manual_seed(bench.seed)
    inputs = network.inputs(bench.device)
    models: dict[str, nn.Module] = {}
    contenders: list[Contender] = []
    backends: dict[str, str] = {}
    for title in TITLES:
        torch.manual_seed(bench.seed)
        model = network.build(network.own).to(bench.device).train()
        first = next(iter(models.values()), None)
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = (
                1e-3 * torch.randn_like(parameter)
                if first is None
                else list(first.parameters())[number].grad
            )
        models[title] = model
        optimizer = OPTIMIZERS[name](model)
        run, taken = _contender(title, model, optimizer, inputs, backend)
        run()
        run()
        contenders.append(Contender(title, run))
        backends[title] = taken() if taken is not None else ""
    learner = network.build(network.own).to(bench.device).train()
    plan = enorm_fx.analyze(learner, inputs, batchnorm="affine")
    contenders.append(Contender("forward and backward", lambda: _learn(learner, network, inputs)))
    found = [bench.measure(contenders) for _ in range(visits)]
    ratios = [
        {t: statistics.median(s[t]) / statistics.median(s["alone"]) for t in TITLES} for s in found
    ]
    entries = sum(p.numel() for p in models["alone"].parameters())
    return {
        "parameters": entries,
        "batch": list(network.shape),
        "backends": backends,
        "visits": [{t: summary(seconds) for t, seconds in s.items()} for s in found],
        "ratios_by_visit": ratios,
        "ratios": {t: statistics.median(r[t] for r in ratios) for t in TITLES},
        "share_of_training_step": {
            t: statistics.median(_share(s, t) for s in found) for t in TITLES if t != "alone"
        },
        "bytes_alone": (5 if name == "SGD" else 7) * entries * _BYTES,
        "floors": floors(name, plan),
    }


def _contender(
    title: str, model: nn.Module, optimizer: Optimizer, inputs: torch.Tensor, backend: str
) -> tuple[Callable[[], object], Callable[[], str] | None]:
    """What is timed, and what says which backend runs it."""
    if title == "alone":
        return optimizer.step, None
    plan = enorm_fx.analyze(model, inputs, batchnorm="affine")
    order = "alternating" if title == "alternating" else "sequential"
    fused = title != "unfused"
    enorm = ENorm(
        plan, optimizer, start="as_is", order=order, fused=fused,
        backend=backend if fused else "auto",
    )  # fmt: skip
    if title != "unfused":
        return optimizer.step, lambda: enorm.backend

    def both() -> None:
        optimizer.step()
        enorm.step()

    return both, lambda: enorm.backend


def _learn(model: nn.Module, network: Network, inputs: torch.Tensor) -> None:
    output = model(inputs)
    logits = getattr(output, "logits", output)
    logits.square().mean().backward()
    model.zero_grad()


def _share(seconds: dict[str, list[float]], title: str) -> float:
    """What ENorm adds to a training step with the optimizer alone."""
    median = {t: statistics.median(s) for t, s in seconds.items()}
    step = median["forward and backward"] + median["alone"]
    return (median[title] - median["alone"]) / step


def floors(name: str, plan: Plan) -> dict[str, float]:
    """What memory must read and write at least, in multiples of the optimizer's own bytes.

    SGD reads w, g, m and writes w, m: five numbers an entry; AdamW has a buffer more: seven. ENorm
    after it reads w twice and writes it once, and reads and writes buffers: as much again. Fused
    reads g once more, to look at it before anything is written. The sequential order reads matrices
    of which two groups move rows and columns once more, if they do not stay in a cache: the figure
    for "uncached". Of kernels it reads sums.
    """
    own = 5 if name == "SGD" else 7
    parameters = dict(plan.model.named_parameters())
    met = Counter(n for group in plan.groups for n in {*group.producers, *group.consumers})
    again = sum(
        p.numel()
        for p in (parameters[n] for n, groups in met.items() if groups > 1)
        if p.dim() > 1 and p.shape[2:].numel() == 1
    )
    entries = sum(parameter.numel() for parameter in parameters.values())
    one_pass = (own + 1) / own
    return {
        "unfused": 2.0,
        "fused": one_pass,
        "fused, uncached": one_pass + again / entries / own,
        "alternating": one_pass,
    }


def markdown(record: dict[str, Any]) -> str:
    """The table of the README; the floor of one pass stands in brackets."""
    titles = [t for t in TITLES if t != "alone"]
    head = ["", "", "optimizer alone", *(TITLES[t] for t in titles)]
    head += [f"training step, {TITLES[t]}" for t in titles]
    rows = [head, ["---", "---"] + ["---:"] * (len(head) - 2)]
    for network, by_optimizer in record["networks"].items():
        for name, row in by_optimizer.items():
            alone = statistics.median(visit["alone"]["median"] for visit in row["visits"])
            cells = [f"{row['ratios']['unfused']:.2f}"]
            cells += [f"{row['ratios'][t]:.2f} ({row['floors'][t]:.2f})" for t in titles[1:]]
            cells += [f"{row['share_of_training_step'][t]:+.1%}" for t in titles]
            rows.append([network, name, f"{1e3 * alone:.3g} ms", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write JSON, print the table; returns the exit status."""
    known = networks()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.fused")
    parser.add_argument("--networks", nargs="+", choices=known, default=list(known))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of a visit")
    parser.add_argument("--visits", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto", help="of the fused steps")
    parser.add_argument("--out", type=Path, default=RESULTS / "speed_fused.json")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    bench = Bench(device, ("native",), options.rounds, options.budget, options.seed)
    begin = time.perf_counter()
    record: dict[str, Any] = {
        "benchmark": "speed.fused",
        "environment": environment(bench.device, bench.seed),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "rounds": options.rounds,
        "budget_seconds": options.budget,
        "unit": "seconds",
        "networks": {},
    }
    for network in options.networks:
        record["networks"][network] = {}
        for name in OPTIMIZERS:
            print(f"{time.perf_counter() - begin:6.0f} s  {network}, {name}", file=sys.stderr)
            record["networks"][network][name] = costs(
                known[network], name, bench, options.visits, options.backend
            )
    record["total_seconds"] = time.perf_counter() - begin
    record["load_after"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    write_json(options.out, record)
    if importlib.util.find_spec("matplotlib"):
        from benchmarks.speed.fused_plot import draw

        draw(options.out.with_suffix(".png"), record)
    print(markdown(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
