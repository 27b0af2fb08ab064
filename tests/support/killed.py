"""Run something in a child process that is killed, or has no room to write."""

from __future__ import annotations

import itertools
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def killed_at_every_stage(action: Callable[[], object], folder: Path) -> Iterator[str]:
    """Run the action again and again, each time killed (SIGKILL) a little later: just before the
    first, second, ... time that it opens, makes, renames or removes something in the folder, or
    syncs a file. Names what was about to happen; the caller looks at what is left, and cleans up.

    Ends when the action ends before it is killed.
    """
    for number in itertools.count():
        readable, writable = os.pipe()
        status = _in_child(lambda n=number, w=writable: _stop_at(n, action, folder, w))
        os.close(writable)
        with os.fdopen(readable) as said:
            event = said.read()
        if status == 0:
            return
        assert os.WIFSIGNALED(status), f"the child failed before {event or 'it was killed'}"
        yield event


def killed_at_random(
    action: Callable[[], object], seconds: float, times: int, seed: int
) -> Iterator[float]:
    """Run the action so often, each time killed (SIGKILL) after some part of so many seconds, which
    is what is given; the caller looks at what is left, and cleans up."""
    chance = random.Random(seed)
    for _ in range(times):
        delay = chance.uniform(0, seconds)
        child = _forked(action)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)  # one that has ended waits to be waited for
        os.waitpid(child, 0)
        yield delay


def with_room_for(nbytes: int, action: Callable[[], object]) -> int:
    """Run the action in a child that can write no file beyond so many bytes: its exit status."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
        action()

    return os.waitstatus_to_exitcode(_in_child(limited))


def _in_child(action: Callable[[], object]) -> int:
    """What os.waitpid says of a child that runs the action; 256 where it raised something."""
    return os.waitpid(_forked(action), 0)[1]


def _forked(action: Callable[[], object]) -> int:
    """The process of a child that runs the action."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of torch may be around
        child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)  # a forked process has no others
        action()
        os._exit(0)
    except SystemExit as leaving:
        os._exit(leaving.code if isinstance(leaving.code, int) else 1)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def _stop_at(number: int, action: Callable[[], object], folder: Path, writable: int) -> None:
    count = 0

    def meet(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in _EVENTS and str(arguments[0]).startswith(str(folder)):
            if count == number:
                os.write(writable, f"{event} {Path(str(arguments[0])).name}".encode())
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sync = os.fsync

    def fsync(handle: int) -> None:
        meet("open", (f"{folder}/fsync",))
        sync(handle)

    os.fsync = fsync
    sys.addaudithook(meet)
    action()
