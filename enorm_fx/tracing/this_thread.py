"""Watch the modules and the custom autograd functions that one thread runs.

Torch has one place for hooks on every module and one `autograd.Function.apply`, for all threads of
the process. What is put there while a model is traced asks first which thread is calling: any other
thread, one that trains meanwhile, runs as ever.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Watcher(Protocol):
    """What is told."""

    def enter(self, module: nn.Module) -> None:
        """A module begins."""

    def leave(self) -> None:
        """The module that was entered last is done."""

    def run_function(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a custom autograd function; original: its own `apply`."""


class _Current(threading.local):
    watcher: Watcher | None = None


_current = _Current()
_lock = threading.Lock()
_handles: list[RemovableHandle] = []
_watching = 0  # in how many threads, nested ones counted too
_apply = torch.autograd.Function.__dict__["apply"]


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Tell the watcher of all that this thread runs in this block, and of no other thread's."""
    outer = _current.watcher
    _install()
    _current.watcher = watcher
    try:
        yield
    finally:
        _current.watcher = outer
        _remove()


def _install() -> None:
    global _watching, _apply
    with _lock:
        _watching += 1
        if _watching == 1:
            _apply = torch.autograd.Function.__dict__["apply"]
            torch.autograd.Function.apply = classmethod(_apply_watched)
            _handles.append(nn.modules.module.register_module_forward_pre_hook(_enter))
            _handles.append(
                nn.modules.module.register_module_forward_hook(_leave, always_call=True)
            )


def _remove() -> None:
    global _watching
    with _lock:
        _watching -= 1
        if _watching == 0:
            torch.autograd.Function.apply = _apply
            while _handles:
                _handles.pop().remove()


def _enter(module: nn.Module, args: Any) -> None:
    if _current.watcher is not None:
        _current.watcher.enter(module)


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if _current.watcher is not None:
        _current.watcher.leave()


def _apply_watched(cls: Any, *args: Any, **kwargs: Any) -> Any:
    original = _apply.__get__(None, cls)
    if _current.watcher is None:
        return original(*args, **kwargs)
    return _current.watcher.run_function(original, args, kwargs)
