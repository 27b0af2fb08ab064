"""What a step costs that goes to the optimum of the moment: for `python -m benchmarks.speed`."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.speed.bench import OURS, Bench, try_enorm
from benchmarks.speed.costs import ratios
from benchmarks.speed.interleave import Contender, summary
from benchmarks.speed.networks import Network
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.converge import converge_
from enorm_fx.step.making import Maker
from enorm_fx.step.precision import full_precision

RATE = 0.01


def converge_costs(network: Network, bench: Bench) -> dict[str, Any]:
    """One cycle (`Bench.usual`, and eager), and `converge=True`, each after the same SGD step.

    Before each, weights and momentum are put back to those of the optimum, and one SGD step with
    momentum and the learning rate 0.01 moves them away: what a step finds in training.
    """
    setup, plan = bench.set_up(network, network.own)
    skipped: dict[str, str] = {}
    options: dict[str, dict[str, Any]] = {
        "cycle": {"backend": bench.usual},
        "cycle, eager": {"backend": "eager"},
        "converge": {"converge": True},
    }
    enorms = {
        name: enorm
        for name, settings in options.items()
        if (enorm := try_enorm(plan, setup.optimizer, skipped, name, **settings))
    }
    found: dict[str, Any] = {"network": network.name, "rate": RATE, "skipped": skipped}
    if "converge" not in enorms:
        return {**found, "contenders": {}, "ratios": {}}
    enorms["converge"].step()
    states = setup.optimizer.state
    held = [t for p in setup.model.parameters() for t in (p.detach(), *_buffers(states[p]))]
    optimum = [tensor.clone() for tensor in held]

    def put_back() -> None:
        for tensor, kept in zip(held, optimum, strict=True):
            tensor.copy_(kept)

    def move() -> None:
        put_back()
        _step(setup.optimizer, RATE)

    contenders = [
        Contender("sgd", lambda: _step(setup.optimizer, RATE), put_back),
        *(Contender(name, enorm.step, move) for name, enorm in enorms.items()),
    ]
    seconds = bench.measure(contenders)
    move()
    careful = CarefulStep(plan, Maker(plan, OURS, (), {}, "auto", False).groups, p=2, wide=True)
    careful.bind_()
    with full_precision(careful.device):
        cycles, gap = converge_(careful.measure_()[0], 1e-8, polish=False)
    return {
        **found,
        "backend": enorms["cycle"].backend if "cycle" in enorms else "",
        "contenders": {name: summary(values) for name, values in seconds.items()},
        "ratios": ratios(seconds, "cycle") if "cycle" in seconds else {},
        "over_sgd": ratios(seconds, "sgd"),
        "cycles": cycles,
        "gap": gap,
    }


def _buffers(state: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in state.values() if isinstance(value, torch.Tensor)]


def _step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
