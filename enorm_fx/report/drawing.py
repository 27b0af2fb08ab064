"""What every drawing of a plan shows: the calls of the dataflow, coloured by group.

One colour stands for one group. A call that reads a weight has two halves: the upper one shows
the groups that divide the weight (its input side), the lower one those that multiply it (its
output side); the calls and edges between have the colour of what they pass on. Grey is pinned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from enorm_fx.plan.data import PlanData
from enorm_fx.report.names import few, short, short_source
from enorm_fx.report.sides import sides

# Told apart with any colour vision (after Okabe & Ito and Tol), and dark enough on white.
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#882255", "#999933",
    "#332288",
)  # fmt: skip
PINNED, SEVERAL = "#a3a9b1", "#4d5560"
MOST_COLOURS = 3  # on one edge; more groups are drawn as one dark line


@dataclass(frozen=True, slots=True)
class DrawnCall:
    """One call, or one input of the model, as it is drawn.

    number:     of the node in `plan.graph`.
    name:       of the node in the trace; inputs are shown by it.
    module:     path of the module that makes the call; source: "file.py:line" of its code.
    parameters: names of those that it reads.
    size:       shapes of the weights that it reads; empty for a call without weights.
    takes:      groups that divide its weights; makes: groups that multiply them.
    carries:    groups that scale its result.
    pins:       what it pins, and why; empty if nothing is blocked because of it.
    stays:      for each pinned side of its weights: ("layer output", why).
    leaf:       it is an input of the model.
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
        """All groups that move its weights or its result, in order."""
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
            ("divided by", group_numbers(self.takes)),
            ("multiplied by", group_numbers(self.makes)),
            ("passes on", "" if self.size else group_numbers(self.carries)),
            ("pins", self.pins),
        ]
        head = self.name if self.leaf else self.op
        return "\n".join([head, *(f"{key}: {value}" for key, value in facts if value), *stays])


def colour(group: int) -> str:
    """The colour of a group, as "#rrggbb"; those of neighbouring numbers differ."""
    return PALETTE[group % len(PALETTE)]


def drawn_calls(plan: PlanData) -> list[DrawnCall]:
    """Every node of `plan.graph`, in execution order."""
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
            DrawnCall(
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
    """The groups of several lists, each once, in order."""
    return tuple(sorted({g for some in groups for g in some}))


def group_numbers(groups: Sequence[int]) -> str:
    """The groups in words: "group 3", "groups 3, 5", nothing for none."""
    name = "group" if len(groups) == 1 else "groups"
    return f"{name} {', '.join(map(str, groups))}" if groups else ""


def printable(text: str) -> str:
    """The text, with escapes for the characters that no document may hold."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def tint(hexadecimal: str, strength: float = 0.35) -> str:
    """A colour mixed with white, for fills that dark text stands on."""
    channels = [int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - (255 - c) * strength):02x}" for c in channels)
