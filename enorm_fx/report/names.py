"""How names are shown: layers for weights, many alike ones folded, long ones broken at dots."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BREAK = re.compile(r"[./](?!py:)(?![^{]*\})")  # not inside net.py:7 or {1..6}
_SPELLED_NAMES = 4  # longer lists are folded: conv{1..6}


def short(name: str) -> str:
    """A layer's weight goes by the layer's name."""
    return name.removesuffix(".weight")


def short_source(source: str) -> str:
    """The part of a path that tells people where to look."""
    inside = source.replace("\\", "/").rpartition("/site-packages/")[2]
    return inside.removeprefix(f"{Path.cwd().as_posix()}/")


def plural(number: int, what: str) -> str:
    """A number and what it counts: "3 pairs", "1 pair"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def broken(name: str, width: int) -> list[str]:
    """A name in lines of at most `width`, broken after a dot or a slash where there is one."""
    lines, indent = [], ""
    while len(indent) + len(name) > width:
        room = max(width - len(indent), 1)
        at = max((m.end() for m in _BREAK.finditer(name) if m.end() <= room), default=room)
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


_NUMBER = re.compile(r"([0-9]+)")
_Row = tuple[list[str], ...]


@dataclass(slots=True)
class Run:
    """Rows of names that differ in one number each, which goes up by one from row to row.

    first, last: the names of two rows, each cut into its texts and numbers.
    """

    key: Any
    first: _Row
    last: _Row
    count: int = 1

    def takes(self, row: _Row) -> bool:
        """Add the row, which may differ in the moving numbers only, if it is the next one."""
        steps = _steps(self.last, row)
        if 1 not in steps or not steps <= {0, 1} or not self._goes_on(row):
            return False
        self.last = row
        self.count += 1
        return True

    def _goes_on(self, row: _Row) -> bool:
        """Whether the numbers that moved so far, and no others, move again."""
        if self.count == 1:
            return True
        pairs = zip(self.first, self.last, row, strict=True)
        return all((one == two) == (two == three) for one, two, three in pairs)

    def spelled(self) -> tuple[str, ...]:
        """The names, with {a..b} for a number that goes from a to b."""
        return tuple(
            "".join(a if a == b else f"{{{a}..{b}}}" for a, b in zip(one, two, strict=True))
            for one, two in zip(self.first, self.last, strict=True)
        )


def _steps(one: _Row, two: _Row) -> set[int]:
    """By how much the numbers of two rows differ."""
    return {
        int(b) - int(a)
        for before, after in zip(one, two, strict=True)
        for a, b in zip(before[1::2], after[1::2], strict=True)
    }


def runs(rows: Iterable[tuple[Hashable, tuple[str, ...]]], *, fold: bool) -> list[Run]:
    """Rows (key, names) in order; those that continue a run of the same key are put into it.

    The numbers that move are in the same place of all names: the place that gives the fewest runs.
    """
    cut = [(key, tuple(_NUMBER.split(name) for name in names)) for key, names in rows]
    if not fold:
        return [Run(key, parts, parts) for key, parts in cut]
    places = max((len(parts) // 2 for _, row in cut for parts in row), default=0)
    return min((_runs_at(cut, place) for place in range(max(places, 1))), key=len)


def _runs_at(rows: list[tuple[Hashable, _Row]], place: int) -> list[Run]:
    """The runs if the numbers that move are the ones at this place of the names."""
    result: list[Run] = []
    latest: dict[Hashable, Run] = {}
    for key, row in rows:
        alike = (key, tuple(_without(parts, place) for parts in row))
        run = latest.get(alike)
        if run is None or not run.takes(row):
            latest[alike] = Run(key, row, row)
            result.append(latest[alike])
    return result


def _without(parts: list[str], place: int) -> tuple[str, ...]:
    """What the names of a run share: all but one number (of which leading zeros are text)."""
    at = 2 * place + 1
    if at >= len(parts):
        return tuple(parts)
    zeros = parts[at][: len(parts[at]) - len(str(int(parts[at])))]
    return (*parts[:at], zeros, *parts[at + 1 :])


def figure(number: float) -> str:
    """A relative distance, with three digits; 0 is exact."""
    return "0" if number == 0 else f"{number:.2e}"
