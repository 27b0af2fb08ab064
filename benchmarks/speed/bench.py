"""What the parts of `python -m benchmarks.speed` share: settings, seeded networks, refusals.

Times are in seconds. A contender named after a backend is one `ENorm.step()`: p = 2, one
sequential cycle if nothing else is said, momentum following. "sgd" is `torch.optim.SGD(fused=True)`
with momentum, "loop" the plain loop, "flat" the floor of `flat_passes`.
"""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

import enorm_fx
from benchmarks.speed.interleave import Contender, interleave
from benchmarks.speed.networks import Network, Setup, set_up
from enorm_fx import ENorm, Plan

# What a backend that this version or machine does not have raises; torch.compile's errors are
# RuntimeErrors.
REFUSALS = (enorm_fx.EnormError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Bench:
    """How everything is measured. budget: seconds a measurement may take, see `interleave`.

    visits: times that the steps of each network are measured, spread over the run. Neighbours on
            the same machine disturb for seconds on end, what is in a cache most of all.
    """

    device: torch.device
    backends: tuple[str, ...]
    rounds: int
    budget: float
    seed: int
    visits: int = 1

    @property
    def usual(self) -> str:
        """The backend of what is measured on one only: the user's default, or the one asked for."""
        return self.backends[0] if len(self.backends) == 1 else "auto"

    def measure(self, contenders: Sequence[Contender]) -> dict[str, list[float]]:
        """Seconds by contender, see `interleave`."""
        return interleave(
            contenders, rounds=self.rounds, budget=self.budget, rng=random.Random(self.seed),
            device=self.device,
        )  # fmt: skip

    def set_up(self, network: Network, norm: str) -> tuple[Setup, Plan]:
        """A seeded network and its plan. What nothing holds of earlier ones is given back first."""
        self.release()
        torch.manual_seed(self.seed)
        setup = set_up(network, norm, self.device)
        return setup, setup.analyze()

    def release(self) -> None:
        """Give memory that nothing holds any more back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def try_enorm(
    plan: Plan, optimizer: Optimizer, skipped: dict[str, str], key: str, **settings: Any
) -> ENorm | None:
    """An ENorm that has made its first steps, or None with the reason in `skipped`."""
    try:
        enorm = make_enorm(plan, optimizer, **settings)
        enorm.step()
        enorm.step()  # some backends capture or specialize on the second one
    except REFUSALS as error:
        skipped[key] = reason(error)
        return None
    return enorm


# Of what is measured: as in the authors' program.
OURS: dict[str, Any] = {"start": "as_is", "last_layer": False}


def make_enorm(plan: Plan, optimizer: Optimizer, **settings: Any) -> ENorm:
    """An ENorm with the backend that is asked for: a fall-back is an error, not a figure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        enorm = ENorm(plan, optimizer, **{**OURS, **settings})
        wanted = settings.get("backend", "auto")
        if wanted not in ("auto", enorm.backend):
            raise RuntimeError(f"this machine has no backend '{wanted}'")
    return enorm


def reason(error: Exception) -> str:
    """One line of an error; paths of this machine, which later lines may hold, stay out."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}"
