"""A stopwatch that can be started and stopped many times."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Adds up the time spent inside `with watch:` blocks.

    On CUDA the time is taken by events on the current stream, so that the measured program
    never has to wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._started = 0.0
        self._events: list[torch.Event] = []

    def __enter__(self) -> None:
        self._mark()
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._started
        self._mark()

    def read(self) -> float:
        """Seconds since the last reading; starts again at 0."""
        seconds = self._seconds
        if self._on_cuda:
            torch.cuda.synchronize()
            pairs = zip(self._events[::2], self._events[1::2], strict=True)
            seconds = sum(start.elapsed_time(end) for start, end in pairs) / 1e3
        self._seconds, self._events = 0.0, []
        return seconds

    def _mark(self) -> None:
        if self._on_cuda:
            event = torch.Event(self._device, enable_timing=True)
            event.record()
            self._events.append(event)
