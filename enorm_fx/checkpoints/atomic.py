"""Outputs that appear when they are complete: written under another name, then renamed.

Whatever stops the program, what has the wanted name is the old file, nothing, or all of the new
one. What was stopped by force may leave a hidden ".NAME.XXXXXXXX.tmp" beside it.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from enorm_fx.errors import CheckpointError, cannot_write


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path in the same folder at which a file is to be written and synced. If the block ends
    without an error, the file takes the name of `path`, also from an older file.

    Raises CheckpointError where the system refuses that, with nothing left behind.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name a file for the output")
    temporary = _beside(path)
    try:
        yield temporary
        with writing(path):
            temporary.replace(path)
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):  # it may never have been made
            temporary.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """The same for a folder and the synced files in it. `path` must not exist yet, or be an empty
    folder."""
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file: name a new folder for the output")
    temporary = _beside(path)
    with writing(path):
        if path.exists() and any(path.iterdir()):
            raise CheckpointError(f"{path} is not empty: name a new folder for the output")
        temporary.mkdir()
    try:
        yield temporary
        with writing(path):
            for folder, _, _ in os.walk(temporary, topdown=False):
                _sync_folder(Path(folder))
            if path.exists():  # not every system renames onto an empty folder
                path.rmdir()
            temporary.rename(path)
            _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def synced(path: Path) -> None:
    """Bring a file that was written to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses in this block is a CheckpointError that names the path."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(cannot_write(path, error)) from error


def _beside(path: Path) -> Path:
    """A name that nobody uses, in the same folder, so that a rename is one step."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


def _sync_folder(path: Path) -> None:
    """Make the names in a folder last through a power cut, where the system lets us."""
    with suppress(OSError):  # Windows opens no folders, some file systems sync none
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
