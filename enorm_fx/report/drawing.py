"""Draw a plan: the dataflow graph coloured by group, as Graphviz DOT or as a page for a browser.

One colour stands for one group. A call that reads a weight has two halves: the upper one shows
the groups that divide the weight (its input side), the lower one those that multiply it (its
output side); the calls and edges between carry the colour of what they pass on. Grey is pinned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from enorm_fx.plan.data import PlanData
from enorm_fx.report.names import few, short, short_source
from enorm_fx.report.sides import sides

# Told apart with any colour vision (after Okabe & Ito and Tol), and dark enough on white.
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#882255", "#999933",
    "#332288",
)  # fmt: skip
PINNED, SEVERAL = "#a3a9b1", "#4d5560"
_MANY = 3  # more groups on an edge are drawn as one dark line


@dataclass(frozen=True, slots=True)
class Part:
    """One call (or input) of the drawing.

    number:  of the node in plan.graph.
    size:    shapes of the weights that it reads; empty for a call without weights.
    takes:   groups that divide its weights; makes: groups that multiply them.
    carries: groups that scale its result.
    pins:    what it pins, and why; empty if nothing is blocked because of it.
    stays:   for each pinned side of its weights, why.
    """

    number: int
    op: str
    name: str
    module: str
    source: str
    parameters: tuple[str, ...]
    size: str
    takes: tuple[int, ...]
    makes: tuple[int, ...]
    carries: tuple[int, ...]
    pins: str
    stays: tuple[tuple[str, str], ...]
    leaf: bool

    @property
    def groups(self) -> tuple[int, ...]:
        """All groups that have to do with it."""
        return tuple(sorted({*self.takes, *self.makes, *self.carries}))

    @property
    def title(self) -> str:
        """What is shown when the pointer rests on it, one fact a line."""
        stays = [f"{side} pinned: {why}" for side, why in self.stays]
        facts = [
            ("module", self.module),
            ("source", short_source(self.source)),
            ("reads", ", ".join(self.parameters)),
            ("shape", self.size),
            ("divided by", _numbers(self.takes)),
            ("multiplied by", _numbers(self.makes)),
            ("passes on", "" if self.size else _numbers(self.carries)),
            ("pins", self.pins),
        ]
        head = self.name if self.leaf else self.op
        return "\n".join([head, *(f"{key}: {value}" for key, value in facts if value), *stays])


def colour(group: int) -> str:
    """The colour of a group; neighbours differ."""
    return PALETTE[group % len(PALETTE)]


def parts(plan: PlanData) -> list[Part]:
    """Every node of the plan's graph, in execution order."""
    found = sides(plan)
    shapes = {p.name: p.shape for p in plan.parameters}
    weights = {p.name for p in plan.parameters if p.counted}
    pins = _pins(plan)
    result = []
    for number, call in plan.graph.nodes(data=True):
        read = [both for name in call["parameters"] if (both := found.get(name))]
        sizes = ["x".join(map(str, shapes[n])) for n in call["parameters"] if n in weights]
        blocked = [side.blocked for both in read for side in both if side.blocked]
        result.append(
            Part(
                number=number,
                op=call["op"],
                name=call["name"],
                module=call["module"],
                source=call["source"],
                parameters=call["parameters"],
                size=", ".join(sizes),
                takes=_joined(side.groups for _, side in read),
                makes=_joined(side.groups for side, _ in read),
                carries=tuple(call.get("groups", ())),
                pins="; ".join(
                    f"{few(names)} ({why})" for why, names in pins.get(number, {}).items()
                ),
                stays=tuple((f"{short(b.weight)} {b.side}", b.reason) for b in blocked),
                leaf=call["leaf"],
            )
        )
    return result


def _pins(plan: PlanData) -> dict[int, dict[str, list[str]]]:
    """Node of a call -> reason -> the sides of weights that it pins."""
    result: dict[int, dict[str, list[str]]] = {}
    for b in plan.blocked:
        result.setdefault(b.call, {}).setdefault(b.reason, []).append(f"{short(b.weight)} {b.side}")
    return result


def _joined(groups: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sorted({g for some in groups for g in some}))


def _numbers(groups: Sequence[int]) -> str:
    name = "group" if len(groups) == 1 else "groups"
    return f"{name} {', '.join(map(str, groups))}" if groups else ""


def visible(text: str) -> str:
    """Text without characters that no document may hold: they are spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def dot(plan: PlanData, title: str = "") -> str:
    """Graphviz source: calls in clusters by module, reasons as tooltips."""
    every = parts(plan)
    lines = [
        "digraph plan {",
        f"  label={_quoted(title or type(plan.model).__name__)}; labelloc=t; fontname=Helvetica;",
        "  node [shape=box, style=filled, fontname=Helvetica, fontsize=11, height=0.3];",
        "  edge [arrowsize=0.6];",
        *_dot_clusters(every),
    ]
    carried = {part.number: part.carries for part in every}
    for before, after in plan.graph.edges:
        groups = carried[before]
        colours = [colour(g) for g in groups] if len(groups) <= _MANY else [SEVERAL]
        tooltip = _quoted(_numbers(groups) or "keeps its values")
        width = 2 if groups else 1
        lines.append(
            f'  n{before} -> n{after} [color="{":".join(colours) or PINNED}", '
            f"penwidth={width}, tooltip={tooltip}];"
        )
    return "\n".join([*lines, "}", ""])


def _dot_clusters(every: list[Part]) -> Iterator[str]:
    """Nested subgraphs, one for each module inside of which other modules are called."""
    paths = [tuple(part.module.split(".")) if part.module else () for part in every]
    outer = {path[:depth] for path in paths for depth in range(1, len(path))}
    tree: dict[str, Any] = {}
    for part, path in zip(every, paths, strict=True):
        at = tree
        for depth in range(1, len(path) + 1):
            if path[:depth] in outer:
                at = at.setdefault(".".join(path[:depth]), {})
        name = part.name if part.leaf else "" if path in outer or not path else path[-1]
        at.setdefault("", []).append(_dot_node(part, name))
    yield from _dot_tree(tree, "  ", itertools.count())


def _dot_tree(tree: dict[str, Any], indent: str, numbers: Iterator[int]) -> Iterator[str]:
    for name, inside in tree.items():
        if name == "":
            yield from (f"{indent}{node}" for node in inside)
            continue
        yield f"{indent}subgraph cluster_{next(numbers)} {{"
        yield f'{indent}  label={_quoted(name)}; color="#c4cad1"; style=rounded; fontsize=10;'
        yield from _dot_tree(inside, f"{indent}  ", numbers)
        yield f"{indent}}}"


def _dot_node(part: Part, name: str) -> str:
    words = [name] if part.leaf or name == part.op else [name, part.op]
    label = _quoted("\n".join([" ".join(filter(None, words)), part.size]).strip())
    shown = [_dot_colour(part.takes), _dot_colour(part.makes)]
    if not part.stays and not (part.takes or part.makes):
        shown = [_dot_colour(part.carries)]
    fill = ";0.5:".join(dict.fromkeys(shown))
    shape = " shape=ellipse," if part.leaf else ""
    border = ' style="filled,dashed", penwidth=2,' if part.pins else ""
    return (
        f'n{part.number} [label={label},{shape}{border} fillcolor="{fill}", gradientangle=270, '
        f"tooltip={_quoted(part.title)}];"
    )


def _dot_colour(groups: Sequence[int]) -> str:
    if not groups:
        return "#e3e6ea"
    return tint(colour(groups[0])) if len(groups) == 1 else "#c9ced6"


def tint(hexadecimal: str, strength: float = 0.35) -> str:
    """A colour mixed with white, for fills that dark text stands on."""
    channels = [int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - (255 - c) * strength):02x}" for c in channels)


def _quoted(text: str) -> str:
    """A string of the DOT language; backslashes and entities mean nothing special in it."""
    text = visible(text).replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"')
    return '"' + text.replace("\n", "\\n") + '"'
