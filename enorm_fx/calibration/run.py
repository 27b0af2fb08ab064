"""Run a model over batches, and leave it as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from enorm_fx.errors import ArgumentError, EnormError
from enorm_fx.nested import replaced
from enorm_fx.tracing.inputs import as_call
from enorm_fx.tracing.undisturbed import FOREIGN


def run_batches(model: nn.Module, batches: Iterable[Any], observer: Any, what: str) -> int:
    """Call the model on every batch in evaluation mode while `observer` watches; how many.

    Each batch is what `analyze` takes as example inputs; its tensors are moved to the device of the
    model's first parameter. Modes and random numbers are left as they were, whatever happens.

    what: said by the progress bar, which a terminal shows while it lasts.

    Raises ArgumentError for a batch that the model does not accept, or if there is none.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total = len(batches) if isinstance(batches, Sized) else None
    devices = [] if device.type == "cpu" else [device]
    done = 0
    with (
        evaluating(model),
        torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
        torch.no_grad(),
        Progress(
            console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        ) as progress,
    ):
        for batch in progress.track(batches, total=total, description=what):
            args, kwargs = replaced(Tensor, as_call(batch), lambda t: t.to(device))
            try:
                with observer:
                    model(*args, **kwargs)
            except EnormError:
                raise
            except FOREIGN as error:
                raise ArgumentError(
                    f"on batch {done} the model raised {type(error).__name__}: {error}"
                ) from error
            done += 1
    if not done:
        raise ArgumentError("batches is empty: nothing to calibrate with")
    return done


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; afterwards each as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
