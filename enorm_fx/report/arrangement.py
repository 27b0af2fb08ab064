"""Where things stand in the picture: calls down columns in execution order, edges in lanes beside.

A text of many lines is set in columns, and so is a network: calls follow each other downwards, a
column ends where a module does, and an edge that does not lead to the next call runs in a lane
between the columns. Lengths are pixels at normal size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH = 232  # of a call
GAP, HEAD, FOOT, INSET = 9, 19, 7, 8  # between calls; a module's title, its lower rim, its sides
LANE, MARGIN = 6, 16  # between lanes; between them and the calls
_NESTED = 3  # modules drawn inside each other
_RATIO = 1.7  # wanted width / height


@dataclass(frozen=True, slots=True)
class Item:
    """A call to place: its height, and the path of its module."""

    height: int
    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle: x and y of its upper left corner, its size, the name of a module or nothing."""

    x: float
    y: float
    width: float
    height: float
    label: str = ""

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Where everything stands.

    boxes:         of the items.
    inside:        for each item, the path of the innermost module that is drawn around it.
    modules:       boxes of the modules, outer ones first.
    routes:        corner points (x, y) of each edge.
    width, height: of the whole.
    """

    boxes: list[Box]
    inside: list[tuple[str, ...]]
    modules: list[Box]
    routes: dict[tuple[int, int], list[tuple[float, float]]]
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class _Module:
    """A module to draw around the items from `first` to `last`, inside of `level` - 1 others."""

    path: tuple[str, ...]
    first: int
    last: int
    level: int


def arrange(items: Sequence[Item], edges: Iterable[tuple[int, int]]) -> Arrangement:
    """Place items, numbered in execution order, and route the edges between them."""
    columns = _columns(items)
    column_of = {i: c for c, rows in enumerate(columns) for i in rows}
    modules = [_modules(items, rows) for rows in columns]
    heights = [_heights(items, rows, found) for rows, found in zip(columns, modules, strict=True)]
    lanes = _Lanes(list(edges), column_of, heights)
    boxes: dict[int, Box] = {}
    frames: list[Box] = []
    inside: dict[int, tuple[str, ...]] = {}
    x, top = 0.0, float(lanes.gutter)
    for c, rows in enumerate(columns):
        depth = max((m.level for m in modules[c]), default=0)
        x += INSET * depth
        for i in rows:
            y, tall = heights[c][i]
            boxes[i] = Box(x, y + top, WIDTH, tall)
        for module in modules[c]:
            frames.append(_frame(module, boxes, modules[c], depth))
            inside.update(dict.fromkeys(range(module.first, module.last + 1), module.path))
        x += WIDTH + INSET * depth
        lanes.begin[c] = x
        x += lanes.width(c)
    height = max((box.bottom for box in [*boxes.values(), *frames]), default=0.0)
    ordered = [boxes[i] for i in range(len(items))]
    return Arrangement(
        boxes=ordered,
        inside=[inside.get(i, ()) for i in range(len(items))],
        modules=frames,
        routes=lanes.routes(ordered, top),
        width=x,
        height=height,
    )


def _columns(items: Sequence[Item]) -> list[range]:
    """Cut the sequence where few modules are cut through, into columns of about one height."""
    heights = [item.height + GAP + 4 for item in items]  # 4: its share of modules' titles
    total = sum(heights)
    count = max(1, round(math.sqrt(_RATIO * total / (WIDTH + 60))))
    columns: list[range] = []
    start = 0
    while start < len(items):
        wanted = sum(heights[start:]) / max(count - len(columns), 1)
        best, best_cost, height = len(items), math.inf, 0
        for end in range(start + 1, len(items) + 1):
            height += heights[end - 1]
            if height > 1.3 * wanted and end > start + 1:
                break
            common = _common(items[end - 1].path, items[end].path) if end < len(items) else 0
            cost = abs(height / wanted - 1) + 0.25 * common
            if cost < best_cost:
                best, best_cost = end, cost
        columns.append(range(start, best))
        start = best
    return columns


def _common(one: Sequence[str], two: Sequence[str]) -> int:
    """How many names two paths have in common from their beginning on."""
    count = 0
    for a, b in zip(one, two, strict=False):
        if a != b:
            break
        count += 1
    return count


def _modules(items: Sequence[Item], rows: range) -> list[_Module]:
    """Modules of which several calls follow each other, outer ones first, no two alike."""
    found: list[_Module] = []

    def search(first: int, end: int, depth: int, level: int) -> None:
        i = first
        while i < end:
            key = items[i].path[: depth + 1]
            j = i + 1
            while j < end and len(key) > depth and items[j].path[: depth + 1] == key:
                j += 1
            if j - i > 1 and level <= _NESTED:
                shared = min(_common(items[i].path, items[k].path) for k in range(i, j))
                found.append(_Module(items[i].path[:shared], i, j - 1, level))
                search(i, j, shared, level + 1)
            i = j

    search(rows.start, rows.stop, 0, 1)
    return sorted(found, key=lambda m: m.level)


def _heights(
    items: Sequence[Item], rows: range, modules: Sequence[_Module]
) -> dict[int, tuple[float, int]]:
    """Item -> its upper end and height, with room for the modules' titles and rims."""
    result, y = {}, 0.0
    for i in rows:
        y += HEAD * sum(m.first == i for m in modules)
        result[i] = (y, items[i].height)
        y += items[i].height + GAP + FOOT * sum(m.last == i for m in modules)
    return result


def _frame(module: _Module, boxes: dict[int, Box], modules: Sequence[_Module], depth: int) -> Box:
    """The box of a module, with room for the titles and rims of those inside."""
    first, last = boxes[module.first], boxes[module.last]
    above = sum(m.first == module.first and m.level > module.level for m in modules)
    below = sum(m.last == module.last and m.level > module.level for m in modules)
    side = INSET * (depth + 1 - module.level)
    top = first.y - HEAD * (above + 1)
    bottom = last.bottom + FOOT * (below + 1)
    return Box(first.x - side, top, WIDTH + 2 * side, bottom - top, ".".join(module.path))


class _Lanes:
    """Lanes beside each column and in the gutter above: one for each source that needs it."""

    def __init__(
        self,
        edges: list[tuple[int, int]],
        column_of: dict[int, int],
        heights: list[dict[int, tuple[float, int]]],
    ) -> None:
        self.column_of = column_of
        self.edges = edges
        self.begin: dict[int, float] = {}
        centre = {i: y + h / 2 for rows in heights for i, (y, h) in rows.items()}
        spans: dict[tuple[int, int], tuple[float, float]] = {}  # (zone, source) -> from, to
        across: dict[tuple[int, int], tuple[float, float]] = {}
        for a, b in edges:
            for zone, y in self._stops(a, b, centre):
                low, high = spans.get((zone, a), (y, y))
                spans[zone, a] = (min(low, y), max(high, y))
            if self._far(a, b):
                end = max(column_of[b], across.get((0, a), (0, 0))[1])
                across[0, a] = (column_of[a], end)
        self.lane = _assigned(spans)
        self.row = _assigned(across)
        self.gutter = (max(self.row.values()) + 1) * LANE + MARGIN if self.row else 0

    def _direct(self, a: int, b: int) -> bool:
        """Whether the edge leads straight down to the next item."""
        return b == a + 1 and self.column_of[a] == self.column_of[b]

    def _far(self, a: int, b: int) -> bool:
        """Whether the edge leads over a column, and so through the gutter."""
        return self.column_of[b] > self.column_of[a] + 1

    def _stops(self, a: int, b: int, centre: dict[int, float]) -> list[tuple[int, float]]:
        """(zone, height) of the points between which lanes run."""
        if self._direct(a, b):
            return []
        if self._far(a, b):
            there = self.column_of[b] - 1
            top = -float(MARGIN)
            return [(self.column_of[a], centre[a]), (self.column_of[a], top),
                    (there, top), (there, centre[b])]  # fmt: skip
        return [(self.column_of[a], centre[a]), (self.column_of[a], centre[b])]

    def width(self, column: int) -> float:
        """The room for lanes beside a column."""
        used = [lane for (zone, _), lane in self.lane.items() if zone == column]
        return 2 * MARGIN + LANE * max(used) if used else 2 * MARGIN

    def routes(
        self, boxes: list[Box], top: float
    ) -> dict[tuple[int, int], list[tuple[float, float]]]:
        """The corner points of every edge, when `begin` of every column is known."""
        arrivals: dict[tuple[int, bool], list[int]] = {}
        for a, b in self.edges:
            if not self._direct(a, b):
                left = self.column_of[a] != self.column_of[b]
                arrivals.setdefault((b, left), []).append(a)
        for (b, left), sources in arrivals.items():
            zone = self.column_of[b] - left
            sources.sort(key=lambda a: self.lane[zone, a], reverse=left)
        result = {}
        for a, b in self.edges:
            one, two = boxes[a], boxes[b]
            if self._direct(a, b):
                x = one.x + one.width / 2
                result[a, b] = [(x, one.bottom), (x, two.y)]
                continue
            left = self.column_of[a] != self.column_of[b]
            sources = arrivals[b, left]
            share = (sources.index(a) + 1) / (len(sources) + 1)
            end = (two.x if left else two.right, two.y + share * two.height)
            start = (one.right, one.y + 0.75 * one.height)
            here = self._x(self.column_of[a], a)
            points = [start, (here, start[1])]
            if self._far(a, b):
                there = self._x(self.column_of[b] - 1, a)
                y = top - MARGIN - self.row[0, a] * LANE
                points += [(here, y), (there, y), (there, end[1])]
            else:
                points += [(here, end[1])]
            result[a, b] = [*points, end]
        return result

    def _x(self, zone: int, source: int) -> float:
        """Where the lane of a source runs."""
        return self.begin[zone] + MARGIN + LANE * self.lane[zone, source]


def _assigned(spans: dict[tuple[int, int], tuple[float, float]]) -> dict[tuple[int, int], int]:
    """A lane for each span, so that spans of one zone that overlap are apart; short ones first."""
    taken: dict[tuple[int, int], list[tuple[float, float]]] = {}
    result = {}
    for (zone, source), (low, high) in sorted(spans.items(), key=lambda s: s[1][1] - s[1][0]):
        lane = 0
        while any(low <= b and a <= high for a, b in taken.get((zone, lane), [])):
            lane += 1
        taken.setdefault((zone, lane), []).append((low, high))
        result[zone, source] = lane
    return result
