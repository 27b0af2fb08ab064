"""Watch the modules and the custom autograd functions that one thread runs.

Torch has one place for hooks on every module and one `autograd.Function.apply`, for all threads of
the process. What is put there while a model is traced asks first which thread is calling: any other
thread, one that trains meanwhile, runs as ever.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """What torch.compile has compiled runs as it was written in this block, in this thread."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None:  # nothing was compiled
        yield
    elif not any(isinstance(module, frames.OptimizedModule) for module in model.modules()):
        with _eager(frames):
            yield
    else:
        with _eager(frames), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile\\(module\\)` when there are")
            yield


def _eager(frames: Any) -> AbstractContextManager[Any]:
    """Older versions of torch know no way to say so for one thread: it holds in every thread."""
    if hasattr(frames, "_use_eager_on_nested_compile"):
        eager: AbstractContextManager[Any] = frames._use_eager_on_nested_compile()
        return eager
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


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
