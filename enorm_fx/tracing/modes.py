"""The modes that code can ask for: training, gradients, inference, autocast."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

from enorm_fx.tracing.trace import is_internal

# What code can ask torch for, each with the questions that it asks.
QUESTIONS: dict[Any, str] = {
    torch.is_grad_enabled: "grad",
    torch.is_inference_mode_enabled: "inference",
    torch.is_autocast_enabled: "autocast",
    torch.is_autocast_cpu_enabled: "autocast",
}
ALL = frozenset(QUESTIONS.values())

_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu")  # those that have an autocast of their own


@dataclass(frozen=True, slots=True)
class Mode:
    """How a model and torch are set while the model runs.

    switched: training instead of evaluation, or the other way round.
    """

    switched: bool = False
    grad: bool = False
    inference: bool = False
    autocast: bool = False

    @contextmanager
    def entered(self, model: nn.Module) -> Iterator[None]:
        """Be in this mode in this block and this thread; afterwards all is as it was."""
        modules = model.modules() if self.switched else ()
        before = [(module, module.training) for module in modules]
        training = not model.training
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad):
            autocast = [(device, torch.is_autocast_enabled(device)) for device in _DEVICES]
            try:
                for device in _DEVICES:
                    torch.set_autocast_enabled(device, self.autocast)
                for module, _ in before:
                    module.training = training
                yield
            finally:
                for device, was in autocast:
                    torch.set_autocast_enabled(device, was)
                torch.clear_autocast_cache()
                for module, was in before:
                    module.training = was

    def words(self, model: nn.Module) -> str:
        """How it is called in a sentence."""
        words = ["training" if model.training != self.switched else "evaluation", "mode"]
        words += ["with gradients"] * self.grad + ["under torch.inference_mode"] * self.inference
        return " ".join(words + ["under autocast"] * self.autocast)


def is_users(module: nn.Module) -> bool:
    """Whether a module is of a class that is not torch's own."""
    return not is_internal(getattr(sys.modules.get(type(module).__module__), "__file__", "") or "")


class Questions:
    """Notes what code that is not torch's asks about modes in a block, in this thread.

    However it is spelled: Python itself tells of each call (`sys.setprofile`). Where that is taken,
    by a profiler, everything counts as asked.

    asked: takes the modes; None: nobody wants to know.
    """

    def __init__(self, asked: set[str] | None) -> None:
        self._asked = asked
        self._active = False

    def note(self, mode: str) -> None:
        """This mode was asked for."""
        if self._asked is not None:
            self._asked.add(mode)

    def __enter__(self) -> None:
        if self._asked is None:
            return
        if sys.getprofile() is not None:
            self._asked.update(ALL)
            return
        self._active = True
        self.resume()

    def __exit__(self, *error: object) -> None:
        self.pause()
        self._active = False

    def pause(self) -> None:
        """Do not listen from here on."""
        if self._active:
            sys.setprofile(None)

    def resume(self) -> None:
        """Listen again."""
        if self._active:
            sys.setprofile(self._heard)

    def _heard(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and called in QUESTIONS and not is_internal(frame.f_code.co_filename):
            self.note(QUESTIONS[called])
