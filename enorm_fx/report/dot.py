"""The drawing in the language of Graphviz."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from enorm_fx.plan.data import PlanData
from enorm_fx.report.drawing import (
    MOST_COLOURS,
    PINNED,
    SEVERAL,
    DrawnCall,
    colour,
    drawn_calls,
    group_numbers,
    printable,
    tint,
)


def dot(plan: PlanData, title: str = "") -> str:
    """The source of a drawing: `dot -Tsvg` renders it.

    Calls stand in clusters by module; a tooltip says what moves or pins them.
    """
    every = drawn_calls(plan)
    lines = [
        "digraph plan {",
        f"  label={_quoted(title or type(plan.model).__name__)}; labelloc=t; fontname=Helvetica;",
        "  node [shape=box, style=filled, fontname=Helvetica, fontsize=11, height=0.3];",
        "  edge [arrowsize=0.6];",
        *_clusters(every),
    ]
    carried = {call.number: call.carries for call in every}
    for before, after in plan.graph.edges:
        groups = carried[before]
        colours = [colour(g) for g in groups] if len(groups) <= MOST_COLOURS else [SEVERAL]
        tooltip = _quoted(group_numbers(groups) or "keeps its values")
        width = 2 if groups else 1
        lines.append(
            f'  n{before} -> n{after} [color="{":".join(colours) or PINNED}", '
            f"penwidth={width}, tooltip={tooltip}];"
        )
    return "\n".join([*lines, "}", ""])


def _clusters(every: list[DrawnCall]) -> Iterator[str]:
    """Nested clusters, one for each module inside of which other modules are called."""
    paths = [tuple(call.module.split(".")) if call.module else () for call in every]
    outer = {path[:depth] for path in paths for depth in range(1, len(path))}
    tree: dict[str, Any] = {}
    for call, path in zip(every, paths, strict=True):
        at = tree
        for depth in range(1, len(path) + 1):
            if path[:depth] in outer:
                at = at.setdefault(".".join(path[:depth]), {})
        name = call.name if call.leaf else "" if path in outer or not path else path[-1]
        at.setdefault("", []).append(_node(call, name))
    yield from _tree(tree, "  ", itertools.count())


def _tree(tree: dict[str, Any], indent: str, numbers: Iterator[int]) -> Iterator[str]:
    """The lines of nested clusters, each with a number of its own."""
    for name, inside in tree.items():
        if name == "":
            yield from (f"{indent}{node}" for node in inside)
            continue
        yield f"{indent}subgraph cluster_{next(numbers)} {{"
        yield f'{indent}  label={_quoted(name)}; color="#c4cad1"; style=rounded; fontsize=10;'
        yield from _tree(inside, f"{indent}  ", numbers)
        yield f"{indent}}}"


def _node(call: DrawnCall, name: str) -> str:
    """The statement of one call: its upper half is the input side, its lower the output side."""
    words = [name] if call.leaf or name == call.op else [name, call.op]
    label = _quoted("\n".join([" ".join(filter(None, words)), call.size]).strip())
    shown = [_colour(call.takes), _colour(call.makes)]
    if not call.stays and not (call.takes or call.makes):
        shown = [_colour(call.carries)]
    fill = ";0.5:".join(dict.fromkeys(shown))
    shape = " shape=ellipse," if call.leaf else ""
    border = ' style="filled,dashed", penwidth=2,' if call.pins else ""
    return (
        f'n{call.number} [label={label},{shape}{border} fillcolor="{fill}", gradientangle=270, '
        f"tooltip={_quoted(call.title)}];"
    )


def _colour(groups: Sequence[int]) -> str:
    """The fill for some groups: grey for none, darker grey for several."""
    if not groups:
        return "#e3e6ea"
    return tint(colour(groups[0])) if len(groups) == 1 else "#c9ced6"


def _quoted(text: str) -> str:
    """A string of the DOT language; backslashes and entities mean nothing special in it."""
    text = printable(text).replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"')
    return '"' + text.replace("\n", "\\n") + '"'
