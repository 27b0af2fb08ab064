"""What a generated step does together, and what by pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tuning:
    """Numbers of entries.

    small: of a tensor, up to which it is handled together with its like.
    chunk: of a buffer. Pieces of a tensor are multiplied in the order of a list, which torch keeps
           on the CPU only: elsewhere it must be unbounded.
    """

    small: int
    chunk: int


# On a CPU calls are cheap and caches matter; elsewhere every call is a kernel.
_CACHED = Tuning(small=1 << 14, chunk=1 << 19)
_LAUNCHED = Tuning(small=1 << 22, chunk=1 << 62)


def tuning_for(device: torch.device) -> Tuning:
    return _CACHED if device.type == "cpu" else _LAUNCHED
