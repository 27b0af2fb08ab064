"""Before and after as one HTML page: a strip of channels for each layer, and what was left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources

from torch import Tensor

from enorm_fx.report.before_after import Layer, Measured, span
from enorm_fx.report.names import short

_WIDTH, _HEIGHT = 460, 26  # of a strip, in pixels
_TICKS = 200  # channels that are drawn of a layer, spread evenly over its sorted ones


def page(
    title: str,
    facts: Sequence[tuple[str, str]],
    shown: tuple[Layer, ...],
    left_out: Sequence[tuple[str, Sequence[str]]],
) -> str:
    """A page for a browser, complete in one file: it asks for nothing from the network.

    facts: what was done, as pairs of a name and a sentence. left_out: reasons, and what they are
    about.
    """
    low, high = (math.log10(end) for end in span(shown))
    scale = _Scale(low, high)
    pieces = {
        "TITLE": escape(title),
        "STYLE": _file("before_after.css"),
        "FACTS": "".join(f"<dt>{escape(n)}</dt><dd>{escape(t)}</dd>" for n, t in facts),
        "AXIS": _axis(scale),
        "ROWS": "\n".join(_row(layer, scale) for layer in shown),
        "LEFT": "\n".join(_left(left_out)) or "<p>Nothing.</p>",
    }
    text = _file("before_after.html")
    return "".join(pieces[p] if i % 2 else p for i, p in enumerate(text.split("@")))


def _file(name: str) -> str:
    folder = resources.files(__package__) / "assets"
    return (folder / name).read_text(encoding="utf-8")


class _Scale:
    """From a decimal logarithm to pixels."""

    def __init__(self, low: float, high: float) -> None:
        margin = max(0.04 * (high - low), 0.02)
        self.low, self.high = low - margin, high + margin

    def __call__(self, log: float) -> float:
        return _WIDTH * (log - self.low) / (self.high - self.low)

    def marks(self) -> list[float]:
        """Logarithms of round numbers: 1, 2, 5, 10 ..., where there is room for them."""
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        kept = (1, 2, 5) if self.high - self.low < 3 else (1,)
        step = max(1, len(decades) // 8)
        logs = [d + math.log10(k) for d in decades[::step] for k in kept]
        return [log for log in logs if self.low <= log <= self.high]


def _axis(scale: _Scale) -> str:
    marks = "".join(
        f'<text x="{scale(log):.1f}" y="12">{10.0**log:.3g}</text>' for log in scale.marks()
    )
    return f'<svg class="axis" width="{_WIDTH}" height="16">{marks}</svg>'


def _row(layer: Layer, scale: _Scale) -> str:
    before, after = layer.before.norm, layer.after.norm
    change = f"{after / before - 1:+.0%}" if before and layer.moved else ""
    lines = "".join(
        f'<path class="grid" d="M{scale(log):.1f} 0v{_HEIGHT}"/>' for log in scale.marks()
    )
    strips = _strip("before", layer.before, 1, scale) + _strip("after", layer.after, 14, scale)
    name = escape(short(layer.name))
    return (
        f"<tr{'' if layer.moved else ' class=same'}><th>{name}</th>"
        f"<td>{len(layer.before.ranges):,}</td><td>{before:.4g}</td><td>{after:.4g}</td>"
        f'<td>{change}</td><td><svg width="{_WIDTH}" height="{_HEIGHT}" role="img" '
        f'aria-label="ranges of the channels of {name}">{lines}{strips}</svg></td></tr>'
    )


def _strip(kind: str, measured: Measured, top: int, scale: _Scale) -> str:
    """A tick for each channel, at the logarithm of its range, and the median."""
    logs = _sorted_logs(measured.ranges)
    if not logs:
        return ""
    count = min(len(logs), _TICKS)
    kept = [logs[i * (len(logs) - 1) // max(count - 1, 1)] for i in range(count)]
    ticks = "".join(f"M{scale(log):.1f} {top}v11" for log in kept)
    middle = scale(logs[len(logs) // 2])
    return (
        f'<path class="{kind}" d="{ticks}"/>'
        f'<circle class="{kind}" cx="{middle:.1f}" cy="{top + 5.5}" r="3.2"/>'
    )


def _sorted_logs(ranges: Tensor) -> list[float]:
    positive = ranges[ranges > 0].sort().values
    found: list[float] = positive.log10().tolist()
    return found


def _left(left_out: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    for reason, names in left_out:
        listed = ", ".join(map(short, names))
        if names:
            yield (
                f"<details><summary>{escape(reason)} <small>{len(names):,}</small></summary>"
                f"<p>{escape(listed)}</p></details>"
            )
        else:
            yield f"<p>{escape(reason)}</p>"
