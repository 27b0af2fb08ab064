"""Why a weight can be rescaled or not, in sentences: one line a step, from cause to weight."""

from __future__ import annotations

import difflib
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from enorm_fx.errors import ArgumentError
from enorm_fx.plan.data import PlanData
from enorm_fx.plan.records import Blocked, ScaledParameter
from enorm_fx.report.names import short, short_source
from enorm_fx.report.sides import Side, sides

_NO_CALL = ("", "input", "parameter")  # places that say nothing


def explain(plan: PlanData, name: str, *, width: int = 100) -> str:
    """Tell in sentences what moves a weight's output and input side, or what pins them.

    Args:
        plan: what `analyze` returned.
        name: of a parameter, or the path of a module, which stands for the weights in it.
        width: lines are wrapped to so many characters.

    Raises:
        ArgumentError: the model has no parameter and no module with parameters of this name.
    """
    return "\n\n".join(
        "\n".join(line for lines in _explanation(plan, found, width) for line in lines)
        for found in _resolved(plan, name)
    )


def _resolved(plan: PlanData, name: str) -> list[str]:
    """The first names of the parameters that a name stands for."""
    first = {alias: p.name for p in plan.parameters for alias in (p.name, *p.aliases)}
    known = {n: first.get(n, n) for n, _ in plan.model.named_parameters(remove_duplicate=False)}
    known.update(first)
    if name in known:
        return [known[name]]
    below = [n for n in known if n.startswith(f"{name}.")]
    own = [n for n in below if "." not in n[len(name) + 1 :]]
    weights = {p.name for p in plan.parameters if p.counted}
    for found in (own, below):
        chosen = [n for n in found if known[n] in weights] or [n for n in found if short(n) != n]
        if chosen:
            return list(dict.fromkeys(known[n] for n in chosen))
    if below:
        return list(dict.fromkeys(known[n] for n in below))
    raise ArgumentError(f"the model has no weight '{name}'; {_closest(name, [*known])}")


def _closest(name: str, known: Sequence[str]) -> str:
    """Names that look like this one, or the first names that there are."""
    if not known:
        return "it has no parameters at all"
    names = list(dict.fromkeys(part for n in known for part in (short(n), n)))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    close = [n for n in close if not (n != short(n) and short(n) in close)]
    return f"close to it: {', '.join(close)}" if close else f"it has {', '.join(names[:3])} ..."


def _explanation(plan: PlanData, name: str, width: int) -> Iterator[list[str]]:
    """The lines about one parameter, a list for each sentence."""
    parameter = next((p for p in plan.parameters if p.name == name), None)
    yield _wrapped(_headline(plan, name, parameter), width)
    both = sides(plan).get(name, ())
    if parameter is None or not (parameter.counted or any(side.blocked for side in both)):
        yield from _companion(plan, name, both, width)
        return
    for side in both:
        if side.blocked is not None:
            yield from _pinned(side.blocked, width)
        elif side.groups:
            yield from _free(plan, name, side, width)
        elif side.name == "output" or len(parameter.shape) > 1:
            text = f"{side.name.capitalize()} side: no group of this plan moves it."
            yield _wrapped(text, width, 1)


def _headline(plan: PlanData, name: str, parameter: ScaledParameter | None) -> str:
    """The parameter with its shape, its other names and the calls that read it."""
    text = name
    if parameter is not None:
        text += f" ({'x'.join(map(str, parameter.shape)) or 'one number'})"
        text += f", also called {', '.join(parameter.aliases)}" if parameter.aliases else ""
    readers = _readers(plan, name)
    if not readers:
        return f"{text}, which no call of the model reads"
    first = _place(f"{readers[0]['module']}.{readers[0]['op']}".lstrip("."), readers[0]["source"])
    more = f" and {len(readers) - 1} more" if len(readers) > 1 else ""
    return f"{text}, read by {first}{more}"


def _readers(plan: PlanData, name: str) -> list[dict[str, Any]]:
    """The calls that read a parameter, in execution order."""
    return [call for _, call in plan.graph.nodes(data=True) if name in call["parameters"]]


def _free(plan: PlanData, name: str, side: Side, width: int) -> Iterator[list[str]]:
    """What moves a side that may be rescaled."""
    part = "" if side.moved == side.slices else f" in {side.moved:,} of {side.slices:,} slices"
    yield _wrapped(f"{side.name.capitalize()} side: rescalable{part}.", width, 1)
    for number in side.groups:
        group = plan.groups[number]
        channels = f"{group.channels:,} channels, one factor d > 0 each"
        if group.channels == 1:
            channels = "one factor d > 0"
        yield _wrapped(f"Group {number}: {channels}", width, 2)
        yield _wrapped(f"- d multiplies {_listed(group.producers, name)}", width, 3)
        if group.via:
            yield _wrapped(f"- passes through {', '.join(group.via)}", width, 3)
        yield _wrapped(f"- divides {_listed(group.consumers, name)}", width, 3)


def _listed(names: Sequence[str], this: str) -> str:
    """Names of layers, with a mark at the one that is explained."""
    return ", ".join(f"{short(n)} (this)" if n == this else short(n) for n in names) or "nothing"


def _pinned(blocked: Blocked, width: int) -> Iterator[list[str]]:
    """What pins a side: a numbered line for each cause, from the first one to the weight."""
    yield _wrapped(f"{blocked.side.capitalize()} side: pinned.", width, 1)
    causes = [(blocked.reason, blocked.node, blocked.source)]
    causes += [(step.reason, step.node, step.source) for step in blocked.chain]
    steps = [_step(*cause) for cause, _ in itertools.groupby(causes)]
    does = "makes" if blocked.side == "output" else "reads"
    steps.append(f"so what {short(blocked.weight)} {does} keeps its values")
    for number, step in enumerate(steps, 1):
        yield _wrapped(f"{number}. {step[:1].upper()}{step[1:]}", width, 2)


def _step(reason: str, node: str, source: str) -> str:
    """A cause as a sentence, with the place where it lies."""
    place = _place(node, source)
    return f"{reason} ({place})" if place else reason


def _companion(plan: PlanData, name: str, both: Sequence[Side], width: int) -> Iterator[list[str]]:
    """A parameter that does not count as a weight, such as a bias."""
    groups = [number for side in both for number in side.groups]
    for number in groups:
        group = plan.groups[number]
        yield _wrapped(
            f"It takes the factors of group {number} ({group.channels:,} channels), which multiply "
            f"{_listed(group.producers, name)} and divide {_listed(group.consumers, name)}.",
            width, 1,
        )  # fmt: skip
    if groups:
        return
    counted = {p.name for p in plan.parameters if p.counted}
    readers = _readers(plan, name)
    weights = [n for call in readers for n in call["parameters"] if n in counted]
    text = "It keeps its values"
    if weights:
        text += f", as what {short(weights[0])} makes does"
    elif any(call["op"].startswith("batch_norm") for call in readers):
        text += ': batchnorm="skip" looks through the layer that it belongs to'
    yield _wrapped(f"{text}.", width, 1)


def _place(node: str, source: str) -> str:
    """Where a cause lies, as far as that says anything."""
    return ", ".join(part for part in (node, short_source(source)) if part not in _NO_CALL)


def _wrapped(text: str, width: int, level: int = 0) -> list[str]:
    """A text in lines of a width; those after the first are indented further."""
    indent = "  " * level
    hang = indent + ("   " if text[:1].isdigit() and text[1:3] == ". " else "  ")
    return textwrap.wrap(
        text, max(width, 24), initial_indent=indent, subsequent_indent=hang,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
