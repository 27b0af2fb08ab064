"""The drawing as one HTML page: an inline SVG, a list of groups beside it, a little script."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from typing import Any

from enorm_fx.plan.data import PlanData
from enorm_fx.report.arrangement import Arrangement, Box, Item, arrange
from enorm_fx.report.contents import exactness, to_dict
from enorm_fx.report.drawing import (
    MOST_COLOURS,
    PALETTE,
    PINNED,
    SEVERAL,
    DrawnCall,
    colour,
    drawn_calls,
    printable,
    tint,
)
from enorm_fx.report.names import few, short

_TALL, _LOW, _BAND = 42, 22, 7  # heights: of calls with weights, other calls, a half's band
_LETTER = 6.7  # width of a character at the size of names, in pixels
_ROUND = 5  # radius of the corners of edges


def html(plan: PlanData, title: str = "") -> str:
    """A page for a browser, complete in one file: it asks for nothing from the network."""
    title = title or type(plan.model).__name__
    data = to_dict(plan)
    shown = {
        "TITLE": _text(title),
        "SUBTITLE": _text(_subtitle(data)),
        "STYLE": _file("drawing.css"),
        "SCRIPT": _file("drawing.js"),
        "KEY": _key(),
        "GROUPS": "\n".join(_group_rows(data["groups"])),
        "PINNED": "\n".join(_pinned_rows(data["blocked"])),
        "DRAWING": svg(plan),
        "DATA": _json({"palette": PALETTE, **data}),
    }
    text = _file("drawing.html")
    pieces = text.split("@")  # @NAME@ in the template
    return "".join(shown[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def svg(plan: PlanData) -> str:
    """The picture by itself: modules as frames, calls as boxes, edges in lanes between them."""
    every = drawn_calls(plan)
    order = {call.number: i for i, call in enumerate(every)}
    edges = [(order[a], order[b]) for a, b in plan.graph.edges]
    items = [Item(_height(call), _path(call)) for call in every]
    arranged = arrange(items, edges)
    box = f"-20 -20 {arranged.width + 40:.0f} {arranged.height + 40:.0f}"
    return "\n".join(
        [
            f'<svg id="drawing" viewBox="{box}" role="img" aria-label="dataflow graph">',
            '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><rect width="5" height="5" fill="#e3e6ea"/>'
            f'<rect width="2" height="5" fill="{PINNED}"/></pattern></defs>',
            *(_frame(frame) for frame in arranged.modules),
            *_edges(every, arranged),
            *(_title(frame) for frame in arranged.modules),
            *(_call(call, arranged.boxes[i], arranged.inside[i]) for i, call in enumerate(every)),
            "</svg>",
        ]
    )


def _path(call: DrawnCall) -> tuple[str, ...]:
    """The names on the way to the module that makes the call."""
    return tuple(call.module.split(".")) if call.module else ()


def _height(call: DrawnCall) -> int:
    """In pixels."""
    return _TALL if _has_weight(call) else _LOW


def _has_weight(call: DrawnCall) -> bool:
    """Whether it has an input and an output side to show."""
    return bool(call.takes or call.makes or call.stays)


def _frame(frame: Box) -> str:
    """The rectangle around the calls of a module."""
    return (
        f'<rect class="module" x="{frame.x:.1f}" y="{frame.y:.1f}" width="{frame.width:.1f}" '
        f'height="{frame.height:.1f}" rx="6"/>'
    )


def _title(frame: Box) -> str:
    """The module's name in the frame's upper left corner."""
    return _word(frame.x + 8, frame.y + 13, _cut(frame.label, frame.width - 16), "module")


def _edges(every: list[DrawnCall], arranged: Arrangement) -> Iterator[str]:
    """Each edge in the colours of the groups that its tensor carries."""
    # Colours over grey, so that a scale can be followed where lines cross.
    ordered = sorted(arranged.routes.items(), key=lambda r: bool(every[r[0][0]].carries))
    for (a, _), points in ordered:
        groups = every[a].carries
        colours = [colour(g) for g in groups] if len(groups) <= MOST_COLOURS else [SEVERAL]
        line, tip = _line(points), _tip(points)
        names = _text(", ".join(map(str, groups)))
        title = f"carries the scale of group {names}" if groups else "keeps its values"
        lines = [
            f'<path d="{line}" stroke="{c}"{_dashes(i, len(colours))}/>'
            for i, c in enumerate(colours or [PINNED])
        ]
        kind = "edge" if groups else "edge still"
        ends = f'<path class="tip" d="{tip}" fill="{(colours or [PINNED])[0]}"/>' if tip else ""
        yield (
            f'<g class="{kind}" data-groups="{_attribute(groups)}">{"".join(lines)}{ends}'
            f"<title>{title}</title></g>"
        )


def _dashes(i: int, count: int) -> str:
    """The dashes of the i-th of several lines that lie on each other."""
    return "" if i == 0 else f' stroke-dasharray="7 {7 * (count - 1)}" stroke-dashoffset="{-7 * i}"'


def _line(points: Sequence[tuple[float, float]]) -> str:
    """A path along the points with round corners."""
    drawn = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for before, at, after in zip(points, points[1:], points[2:], strict=False):
        one, two = _towards(at, before), _towards(at, after)
        drawn.append(
            f"L{one[0]:.1f} {one[1]:.1f}Q{at[0]:.1f} {at[1]:.1f} {two[0]:.1f} {two[1]:.1f}"
        )
    return "".join([*drawn, f"L{points[-1][0]:.1f} {points[-1][1]:.1f}"])


def _towards(at: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """The point beside a corner where its rounding begins."""
    dx, dy = other[0] - at[0], other[1] - at[1]
    length = abs(dx) + abs(dy)
    step = min(_ROUND, length / 2) / length if length else 0
    return at[0] + dx * step, at[1] + dy * step


def _tip(points: Sequence[tuple[float, float]]) -> str:
    """An arrow head where an edge comes in from the side."""
    (x0, _), (x, y) = points[-2], points[-1]
    if x0 == x:
        return ""
    back = x - 6 if x > x0 else x + 6
    return f"M{x:.1f} {y:.1f}L{back:.1f} {y - 3.5:.1f}L{back:.1f} {y + 3.5:.1f}Z"


def _call(call: DrawnCall, box: Box, inside: tuple[str, ...]) -> str:
    """One call with its tooltip and with what the script looks for."""
    kind = "call weight" if _has_weight(call) else "call input" if call.leaf else "call"
    kind += " pins" if call.pins else ""
    shapes = _weight(call, box) if _has_weight(call) else _other(call, box)
    name = ".".join(_path(call)[len(inside) :])
    find = " ".join([call.op, call.name, call.module, *call.parameters]).lower()
    return (
        f'<g class="{kind}" id="call-{call.number}" data-find="{_text(find)}" '
        f'data-groups="{_attribute(call.groups)}" data-takes="{_attribute(call.takes)}" '
        f'data-makes="{_attribute(call.makes)}">'
        f"<title>{_text(call.title)}</title>{shapes}{_labels(call, box, name)}</g>"
    )


def _attribute(groups: Sequence[int]) -> str:
    """Numbers of groups as the value of a data attribute."""
    return " ".join(map(str, groups))


def _weight(call: DrawnCall, box: Box) -> str:
    """A call with weights: two bands, for what divides and what multiplies them."""
    return (
        f'<rect class="body" x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" '
        'rx="4"/>'
        + "".join(_band(call, "input", call.takes, box.x, box.y, box.width))
        + "".join(_band(call, "output", call.makes, box.x, box.bottom - _BAND, box.width))
        + f'<rect class="rim" x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" '
        'rx="4"/>'
    )


def _band(
    call: DrawnCall, side: str, groups: Sequence[int], x: float, y: float, width: float
) -> Iterator[str]:
    """One side of a weight: a field for each group, a hatched one for what is pinned."""
    fills = [colour(g) for g in groups]
    if not groups or any(what.endswith(side) for what, _ in call.stays):
        fills.append("url(#hatch)")
    each = width / len(fills)
    for i, fill in enumerate(fills):
        yield (
            f'<rect x="{x + i * each:.1f}" y="{y:.1f}" width="{each:.1f}" height="{_BAND}" '
            f'fill="{fill}"/>'
        )


def _other(call: DrawnCall, box: Box) -> str:
    """A call without weights, filled with the colour that passes; several stand in a strip."""
    groups = call.carries
    fill = tint(colour(groups[0]), 0.28) if len(groups) == 1 else "#f0f2f5"
    body = (
        f'<rect class="body" x="{box.x}" y="{box.y:.1f}" width="{box.width}" '
        f'height="{box.height}" rx="4" style="fill: {fill}"/>'
    )
    if len(groups) > 1:
        each = (box.width - 8) / len(groups)
        for i, g in enumerate(groups):
            body += (
                f'<rect x="{box.x + 4 + i * each:.1f}" y="{box.bottom - 4:.1f}" '
                f'width="{each:.1f}" height="3" fill="{colour(g)}"/>'
            )
    return body


def _labels(call: DrawnCall, box: Box, name: str) -> str:
    """Name and op; for weights also the shape and the groups above and below."""
    if not _has_weight(call):
        y = box.y + box.height / 2 + 4
        op = call.name if call.leaf else call.op
        room = box.width - 20 - _LETTER * len(op)
        return _word(box.x + 8, y, op, "op") + _word(box.right - 8, y, _cut(name, room), "end")
    room = box.width - 28 - _LETTER * len(call.op)
    ends = f"{_ends(call.takes)} → {_ends(call.makes)}"
    size = _cut(call.size, box.width - 24 - _LETTER * len(ends))
    top, low = box.y + _BAND + 12, box.y + _BAND + 25
    return (
        _word(box.x + 8, top, _cut(name, room) or call.op, "name")
        + (_word(box.right - 8, top, call.op, "end") if name else "")
        + _word(box.x + 8, low, size, "size")
        + _word(box.right - 8, low, ends, "end")
    )


def _ends(groups: Sequence[int]) -> str:
    """The groups of one side in a word or two."""
    return str(groups[0]) if len(groups) == 1 else f"{len(groups)} groups" if groups else "pinned"


def _word(x: float, y: float, text: str, kind: str) -> str:
    """A text of the picture, of a class of the style sheet."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{_text(text)}</text>' if text else ""


def _cut(text: str, room: float) -> str:
    """The end of a text, which tells more than its beginning, where it is too long."""
    most = max(int(room / _LETTER), 0)
    return text if len(text) <= most else f"…{text[len(text) - most + 1 :]}" if most > 1 else ""


def _group_rows(groups: list[dict[str, Any]]) -> Iterator[str]:
    """A button for each group: its colour, number, ends and channels."""
    if not groups:
        yield "<p>No weight can be rescaled.</p>"
    for number, group in enumerate(groups):
        producers, consumers = (_breakable(few(group[k], 1)) for k in ("producers", "consumers"))
        yield (
            f'<button class="group" data-group="{number}">'
            f'<span class="swatch" style="background: {colour(number)}"></span>'
            f'<span class="number">{number}</span>'
            f'<span class="ends">{producers}<br>→ {consumers}</span>'
            f'<span class="channels">{group["channels"]:,}</span></button>'
        )


def _pinned_rows(blocked: list[dict[str, Any]]) -> Iterator[str]:
    """The sides of weights under each reason."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for side in blocked:
        alike.setdefault(side["reason"], []).append(side)
    for reason, found in alike.items():
        yield f"<p>{_text(reason)}: {len(found)}</p>"
        for side in found:
            name = _breakable(f"{short(side['weight'])} {side['side']}")
            yield f'<button class="pinned" data-weight="{_text(side["weight"])}">{name}</button>'


def _breakable(text: str) -> str:
    """The text in HTML; a browser may break it after a dot."""
    return _text(text).replace(".", ".<wbr>")


def _subtitle(data: dict[str, Any]) -> str:
    """The totals in one line, with the notes of the plan."""
    totals = data["totals"]
    counts = (
        f"{totals['weights']:,} weights, {data['num_scales']:,} scales in "
        f"{totals['groups']:,} groups; {exactness(data)}"
    )
    return " ".join([f"{counts}.", *data["notes"]])


def _key() -> str:
    """The legend: what the marks mean."""
    return (
        '<svg class="key" viewBox="0 0 250 84" role="img" aria-label="key">'
        '<rect class="body" x="1" y="2" width="92" height="36" rx="4"/>'
        f'<rect x="1" y="2" width="92" height="6" fill="{PALETTE[0]}"/>'
        f'<rect x="1" y="32" width="92" height="6" fill="{PALETTE[1]}"/>'
        '<rect class="rim" x="1" y="2" width="92" height="36" rx="4"/>'
        '<text class="name" x="8" y="24">weight</text>'
        '<text x="102" y="11">divided by this group</text>'
        '<text x="102" y="39">multiplied by this group</text>'
        '<rect x="1" y="48" width="92" height="6" fill="url(#hatch)"/>'
        '<text x="102" y="55">pinned: keeps its values</text>'
        '<rect class="body pinning" x="1" y="62" width="92" height="18" rx="4"/>'
        '<text x="102" y="75">pins something: point at it</text></svg>'
    )


def _file(name: str) -> str:
    """The text of a file in `assets/`."""
    return (resources.files("enorm_fx.report") / "assets" / name).read_text(encoding="utf-8")


def _text(text: str) -> str:
    """The text as it may stand in HTML, in attributes too."""
    return escape(printable(text), quote=True)


def _json(data: dict[str, Any]) -> str:
    """JSON that may stand in a script element: no "<" occurs in it."""
    return json.dumps(data).replace("<", "\\u003c")
