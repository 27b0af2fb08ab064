"""The native backend: one call of compiled code for a whole step."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any

import torch

from enorm_fx.step.generated.generate import generate
from enorm_fx.step.native.compiler import load
from enorm_fx.step.native.pack import DTYPES, Packer, Unsupported
from enorm_fx.step.recipe import Recipe

_forked: list[bool] = []  # not empty in a process that was forked from one that knew this module
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


def threads_now(most: int) -> int:
    """How many threads may run what was packed for `most`."""
    # A forked process has none of its parent's threads, and OpenMP would wait for them.
    return 1 if _forked else min(most, torch.get_num_threads())


@dataclass(frozen=True, slots=True, eq=False)
class Native:
    """A packed recipe. keep: all memory that it points into."""

    recipe: Recipe
    library: ctypes.CDLL
    packed: Any
    threads: int
    keep: list[Any]

    @property
    def code(self) -> str:
        """The same step as torch operations; nobody can read the tables."""
        return generate(self.recipe).code

    def run(self) -> bool:
        return bool(self.library.enorm_run(ctypes.byref(self.packed), threads_now(self.threads)))


def make_native(recipe: Recipe) -> Native:
    """Raises compiler.CompilerError, or Unsupported: then take another backend."""
    loaded = load()
    for write in recipe.writes:
        if write.tensor.device.type != "cpu" or write.tensor.dtype not in DTYPES:
            raise Unsupported(f"{write.tensor.dtype} on {write.tensor.device}")
        if write.tensor.dtype == torch.float16 and not loaded.enorm_has_half():
            raise Unsupported("the compiler has no half precision numbers")
    packer = Packer(recipe)
    return Native(recipe, loaded, packer.pack(), packer.threads, packer.keep)
