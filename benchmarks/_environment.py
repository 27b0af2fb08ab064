"""Where a benchmark ran, and how its figures are written down."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from enorm_fx._version import __version__

RESULTS = Path(__file__).parent / "results"


def environment(device: torch.device, seed: int) -> dict[str, Any]:
    """Describe machine, versions and seed: what a reader needs to repeat the figures."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": _device_name(device),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "enorm_fx": __version__,
        "seed": seed,
    }


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON; parent folders are made.

    JSON has no infinities and no NaN: a figure that is not finite is written as null.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite_or_null(record), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_null(item) for item in value]
    return value


def _cpu_model() -> str:
    """The processor's name; Linux alone tells more than the architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    """The cores this process may run on, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()
