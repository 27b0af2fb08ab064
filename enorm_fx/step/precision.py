"""Arithmetic that no setting of the user's reaches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients; no autocast and no TensorFloat-32, in which sums would lose most digits."""
    # Asked and set backend by backend: torch's older functions for this refuse to answer once
    # somebody has used the newer ones, and these see what was set by either.
    settings: Any = torch.backends
    backends = (settings.cuda.matmul, settings.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend, precision in zip(backends, before, strict=True):
        if precision not in _FULL:
            backend.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            if precision not in _FULL:
                backend.fp32_precision = precision


_FULL = ("none", "ieee")
