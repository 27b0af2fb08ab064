"""How names are shown: layers for weights, many alike ones folded, long ones broken at dots."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SPELLED_NAMES = 6  # longer lists are folded: conv{1..6}


def short(name: str) -> str:
    """A layer's weight goes by the layer's name."""
    return name.removesuffix(".weight")


def short_source(source: str) -> str:
    """The part of a path that tells people where to look."""
    inside = source.replace("\\", "/").rpartition("/site-packages/")[2]
    return inside.removeprefix(f"{Path.cwd().as_posix()}/")


def broken(name: str, width: int) -> list[str]:
    """A name in lines of at most `width`, broken after a dot or a slash where there is one."""
    lines, indent = [], ""
    while len(indent) + len(name) > width:
        at = max(name.rfind(mark, 0, width - len(indent)) for mark in "./") + 1
        at = at or width - len(indent)
        lines.append(indent + name[:at])
        name, indent = name[at:], "  "
    return [*lines, indent + name]


def few(names: Sequence[str], most: int = 2) -> str:
    """The first names, and how many more there are."""
    rest = f" +{len(names) - most}" if len(names) > most else ""
    return ", ".join(map(short, names[:most])) + rest or "-"


def folded(names: Sequence[str]) -> list[str]:
    """Names, and where there are many, numbers that count up as one: block{1..6}.conv."""
    if not names:
        return ["-"]
    fold = len(names) > _SPELLED_NAMES
    return [run.spelled()[0] for run in runs((((), (short(n),)) for n in names), fold=fold)]


_NUMBER = re.compile(r"(\d+)")


@dataclass(slots=True)
class Run:
    """Rows of names that differ only in numbers, which go up by one from row to row.

    first, last: the names of two rows, each cut into its texts and numbers.
    steps:       0 or 1 for every number, known from the second row on.
    """

    key: Any
    first: tuple[list[str], ...]
    last: tuple[list[str], ...]
    steps: list[list[int]] | None = None
    count: int = 1

    def takes(self, row: tuple[list[str], ...]) -> bool:
        """Add the row if it is the next one."""
        steps = [_steps(one, two) for one, two in zip(self.last, row, strict=True)]
        if self.steps is None:
            # {1..3}.{1..3} in one name would look like nine names.
            fits = all(step in ([], [1]) for step in map(_nonzero, steps)) and any(map(any, steps))
        else:
            fits = steps == self.steps
        if fits:
            self.last, self.steps = row, steps
            self.count += 1
        return fits

    def spelled(self) -> tuple[str, ...]:
        """The names, with {a..b} for a number that goes from a to b."""
        return tuple(
            "".join(a if a == b else f"{{{a}..{b}}}" for a, b in zip(one, two, strict=True))
            for one, two in zip(self.first, self.last, strict=True)
        )


def _steps(one: list[str], two: list[str]) -> list[int]:
    return [int(b) - int(a) for a, b in zip(one[1::2], two[1::2], strict=True)]


def _nonzero(steps: list[int]) -> list[int]:
    return [step for step in steps if step]


def _pattern(parts: list[str]) -> tuple[str, ...]:
    """What the names of a run share; a number with leading zeros is text."""
    return tuple(
        part if i % 2 == 0 else part[: len(part) - len(str(int(part)))]
        for i, part in enumerate(parts)
    )


def runs(rows: Iterable[tuple[Hashable, tuple[str, ...]]], *, fold: bool) -> list[Run]:
    """Rows (key, names) in order; those that continue a run of the same key are put into it."""
    result: list[Run] = []
    latest: dict[Hashable, Run] = {}
    for key, names in rows:
        parts = tuple(_NUMBER.split(name) for name in names)
        alike = (key, tuple(map(_pattern, parts)))
        run = latest.get(alike)
        if not fold or run is None or not run.takes(parts):
            latest[alike] = Run(key, parts, parts)
            result.append(latest[alike])
    return result
