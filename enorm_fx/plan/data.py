"""The immutable result of an analysis: which scales exist and which weights they move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from enorm_fx.symmetry.solution import ScaleTerm

if TYPE_CHECKING:
    import networkx as nx
    from typing_extensions import Self


@dataclass(frozen=True, slots=True, eq=False)
class ScaledParameter:
    """A parameter and its row block of A: log scale of an entry = sum of its terms.

    name:    its first name in `model.named_parameters()`; further names are in `aliases`.
    counted: it is part of the objective J (weights of two or more axes, and the gamma of
             normalization layers; one-axis parameters too with biases="balance").
    depth:   number of weights on the longest path that ends in it (the first one has 1).
    last:    no other weight comes after it.
    terms:   empty for a parameter that nothing may rescale.
    """

    name: str
    shape: tuple[int, ...]
    terms: tuple[ScaleTerm, ...]
    counted: bool
    depth: int
    last: bool
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """Scales that move the same weights in the same way, one per channel.

    channels:  how many scales; they are u[start : start + channels].
    producers: names of the parameters that the scale multiplies, consumers: divides.
    via:       op names on the paths between them, in execution order.
    """

    channels: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    via: tuple[str, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A producer, a consumer that reads what it produces, and the ops that lie between."""

    producer: str
    consumer: str
    channels: int
    via: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Blocked:
    """A side ("output" or "input") of a weight that stays pinned, and why.

    reason: what pinned it; node: module path and op that did, source: "file.py:line" of the
            user's code that called it.
    chain:  the equalities that led from there to the weight, nearest to the reason first, each
            "reason (module.op, file.py:line)".
    """

    weight: str
    side: str
    reason: str
    node: str
    source: str
    chain: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class PlanData:
    """What an analysis found, as data: it knows nothing of reports and steps.

    Users hold `enorm_fx.Plan`, which puts the verbs on top of it.
    """

    model: nn.Module = field(repr=False)
    parameters: tuple[ScaledParameter, ...]
    groups: tuple[Group, ...]
    pairs: tuple[Pair, ...]
    blocked: tuple[Blocked, ...]
    num_scales: int
    exact: bool
    graph: nx.DiGraph = field(repr=False)
    tracer: str
    inputs: tuple[tuple[Any, ...], dict[str, Any]] = field(repr=False)
    notes: tuple[str, ...] = ()

    def select(self, predicate: Callable[[Group], bool]) -> Self:
        """The plan with only the groups for which predicate(group) is true; the others are kept
        as they are. Scales are numbered anew."""
        index = torch.full((self.num_scales + 1,), -1)  # the last entry stands for index -1
        number: dict[int, int] = {}
        groups: list[Group] = []
        start = 0
        for old, group in enumerate(self.groups):
            if predicate(group):
                number[old] = len(groups)
                index[group.start : group.start + group.channels] = torch.arange(
                    start, start + group.channels
                )
                groups.append(replace(group, start=start))
                start += group.channels
        graph = self.graph.copy()
        for _, data in graph.nodes(data=True):
            data["groups"] = tuple(number[g] for g in data["groups"] if g in number)
        return replace(
            self,
            parameters=tuple(_reindexed(parameter, index) for parameter in self.parameters),
            groups=tuple(groups),
            pairs=tuple(p for p in self.pairs if any(_is_of(p, group) for group in groups)),
            num_scales=start,
            graph=graph,
        )


def _is_of(pair: Pair, group: Group) -> bool:
    sides = pair.producer in group.producers and pair.consumer in group.consumers
    return sides and pair.channels == group.channels


def _reindexed(parameter: ScaledParameter, index: Tensor) -> ScaledParameter:
    terms = (ScaleTerm(term.coefficient, index[term.index]) for term in parameter.terms)
    return replace(parameter, terms=tuple(t for t in terms if bool((t.index >= 0).any())))
