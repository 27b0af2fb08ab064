"""Where a command's output goes: the terminal, JSON on stdout, files."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from enorm_fx.errors import ArgumentError, cannot_write

if TYPE_CHECKING:
    from rich.console import Console


HTML = (".html", ".htm")


def check_ending(option: str, path: Path | None, endings: tuple[str, ...]) -> None:
    """A report replaces the file that is there: raises ArgumentError unless its name is of one."""
    if path is not None and path.suffix.lower() not in endings:
        raise ArgumentError(f"{option} {path}: name a file that ends in {' or '.join(endings)}")


def terminal() -> Console:
    """A console that prints names as they are: they may contain brackets."""
    from rich.console import Console

    return Console(markup=False, highlight=False)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, float | None], None]]:
    """A bar on stderr, if that is a terminal: the block says what is being done, and how much of
    it is (0 to 1; None: unknown)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task("", total=None)

        def show(doing: str, done: float | None) -> None:
            total = None if done is None else 1.0
            shown.update(task, description=doing, total=total, completed=done or 0.0)

        yield show


@contextlib.contextmanager
def stdout_kept_for_json(wanted: bool) -> Iterator[None]:
    """If JSON is wanted, send to stderr what code in this block prints, such as the model's."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def write_text(path: Path, text: str) -> None:
    """Write a file that the user named. Raises ArgumentError where that is not possible."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(cannot_write(path, error)) from error
