"""Draws `architecture.svg`, from the list of layers: `python -m docs.draw`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from tests.support.layers import LAYERS, PACKAGE

FILE = Path(__file__).with_name("architecture.svg")
WIDTH, HEIGHT = 1120, 590
ANALYSIS, USE, VERBS, SHELL, PLAIN = "#d6e8f5", "#fbe3c0", "#d5efe3", "#f3dcea", "#eceff2"
LINE, TEXT, QUIET = "#4d5560", "#1c2128", "#57606a"
COLOURS = {
    **dict.fromkeys(("tracing", "symmetry", "rules", "plan"), ANALYSIS),
    **dict.fromkeys(("report", "step", "checkpoints", "calibration", "optim"), USE),
    **dict.fromkeys(("model_plan", "analysis", "balancing", "canonical", "comparing"), VERBS),
    **dict.fromkeys(("enorm", "fingerprinting", "folding", "imbalances", "smoothing"), VERBS),
    **dict.fromkeys(("agreement", "counting", "verifying", "__init__"), VERBS),
    **dict.fromkeys(("integrations", "demo", "cli", "__main__"), SHELL),
}


def picture() -> str:
    """The SVG: how a model flows, and below it the order in which imports go."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif">',
        "<title>How a model flows through enorm_fx, and the order of its layers</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        f'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8Z" fill="{LINE}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *_flow(),
        *_order(424),
        "</svg>",
        "",
    ])  # fmt: skip


def _flow() -> Iterator[str]:
    """What becomes of a model: `analyze` makes a plan of it, and verbs use the plan."""
    yield _word(140, 30, "analyze: four steps, each a call on what the one before gave", 15, QUIET)
    yield _box(16, 62, 92, 76, PLAIN, "a model", ["nn.Module"])
    steps = (
        ("tracing/", ["record every call of one", "run on fake tensors"], "trace()"),
        ("rules/", ["what each op does", "to labels"], "propagate()"),
        ("symmetry/", ["labels; solve the", "equations between them"], "solve()"),
        ("plan/", ["groups, pairs, blocked", "sides, and why"], "describe()"),
    )
    gives = ("", "Trace", "Labels", "Solution")
    for i, (name, does, call) in enumerate(steps):
        x = 140 + 246 * i
        yield _box(x, 50, 178, 100, ANALYSIS, name, does, call)
        yield _arrow([(x - 32 if i == 0 else x - 68, 100), (x - 3, 100)])
        yield _word(x - 35, 92, gives[i], 13, TEXT, "middle")
    yield _arrow([(967, 150), (967, 197)])
    yield _word(977, 178, "PlanData", 13, TEXT)
    yield _box(
        632, 200, 424, 74, VERBS, "Plan", ["what was found, with the verbs on top"], "model_plan.py"
    )
    yield _box(
        16, 200, 478, 74, VERBS, "the verbs", ["analyze, ENorm, balance, verify, smooth ..."],
        "analysis.py enorm.py balancing.py verifying.py ...",
    )  # fmt: skip
    yield _arrow([(632, 235), (497, 235)])
    yield _word(564, 227, "is taken by", 13, TEXT, "middle")
    if (PACKAGE / "checkpoints").is_dir():
        yield _box(342, 326, 152, 62, USE, "checkpoints/", ["weights in files"])
        yield _arrow([(398, 274), (398, 323)])
        yield _word(408, 304, "read and write", 13, TEXT)
    yield _box(16, 326, 310, 62, USE, "step/", ["measure, solve, apply: into model, optimizer"])
    yield _arrow([(171, 274), (171, 323)])
    yield _word(181, 304, "run", 13, TEXT)
    yield _box(632, 326, 424, 62, USE, "report/", ["summary, tables, JSON, sentences, drawings"])
    yield _arrow([(844, 274), (844, 323)])
    yield _word(854, 304, "is told by", 13, TEXT)


def _order(y: float) -> Iterator[str]:
    """The layers in the order of their imports, in lines of chips."""
    yield f'<line x1="16" x2="{WIDTH - 16}" y1="{y}" y2="{y}" stroke="#d0d7de"/>'
    yield _word(
        16, y + 30, "Layers: each imports only from its own and from those before it; "
        "names in one frame stand side by side", 15, QUIET,
    )  # fmt: skip
    x, top = 16.0, y + 48
    there = {path.stem for path in PACKAGE.iterdir()}
    layers = [[name for name in layer if name in there] for layer in LAYERS]
    for layer in filter(None, layers):
        if x > 16:
            yield _word(x - 7, top + 22, "<", 15, QUIET, "middle")
        width = sum(map(_chip, layer)) + 4
        if x + width > WIDTH - 16:
            x, top = 16.0, top + 48
        yield (
            f'<rect x="{x}" y="{top}" width="{width}" height="34" rx="6" fill="none" '
            f'stroke="{LINE}"/>'
        )
        at = x + 4
        for name in layer:
            yield (
                f'<rect x="{at}" y="{top + 4}" width="{_chip(name) - 4}" height="26" rx="4" '
                f'fill="{COLOURS.get(name, PLAIN)}"/>'
            )
            middle = at + (_chip(name) - 4) / 2
            yield _word(middle, top + 22, name, 13, TEXT, "middle", mono=True)
            at += _chip(name)
        x += width + 14


def _chip(name: str) -> float:
    """The width of a layer's name with its background and the gap after it."""
    return 8 * len(name) + 20


def _box(
    x: float, y: float, width: float, height: float, fill: str, name: str, lines: Sequence[str],
    code: str = "",
) -> str:  # fmt: skip
    """A box with a name, lines of text, and a line of code."""
    mono = name.endswith("/")
    words = [_word(x + width / 2, y + 24, name, 16, TEXT, "middle", mono=mono, bold=True)]
    for number, line in enumerate(lines):
        words.append(_word(x + width / 2, y + 44 + 17 * number, line, 13, TEXT, "middle"))
    if code:
        words.append(_word(x + width / 2, y + height - 8, code, 12, QUIET, "middle", mono=True))
    frame = (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" '
        f'stroke="{LINE}"/>'
    )
    return "\n".join([frame, *words])


def _arrow(points: Iterable[tuple[float, float]]) -> str:
    path = "L".join(f"{x} {y}" for x, y in points)
    return (
        f'<path d="M{path}" fill="none" stroke="{LINE}" stroke-width="1.5" marker-end="url(#tip)"/>'
    )


def _word(
    x: float, y: float, text: str, size: int, fill: str, anchor: str = "start", *,
    mono: bool = False, bold: bool = False,
) -> str:  # fmt: skip
    family = ' font-family="Menlo, Consolas, DejaVu Sans Mono, monospace"' if mono else ""
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{family}'
        f"{weight}>{escape(text)}</text>"
    )


if __name__ == "__main__":
    FILE.write_text(picture(), encoding="utf-8")
