"""The immutable result of an analysis: which scales exist and which weights they move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One factor of a parameter: entry e is multiplied by exp(coefficient * u[index[e]]).

    index: int64, as many axes as the parameter, each of size 1 (broadcast) or of the
    parameter's size; -1 where nothing may be rescaled. coefficient is dimensionless.
    """

    coefficient: float
    index: Tensor


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
    terms: tuple[Term, ...]
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
class Plan:
    """What `analyze` found. Immutable; only `rescale_` writes, and it writes into the model."""

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

    def norm(self, p: float = 2, c: float = 1.0) -> float:
        """The objective J of the weights as they are now (dimensionless).

        p: p >= 1 or inf; c: weighs a weight of depth k by c ** (-p * k).
        """
        from enorm_fx.step.measure import objective  # the step builds on plans

        return objective(self, p, c)

    def rescale_(self, log_scales: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Rescale the model in place by u = log_scales, shape (num_scales,): all or nothing.

        The optimizer's buffers follow. Raises ArgumentError for a wrong shape or values that are
        not finite, NonFiniteError, OptimizerStateError, PlanError; nothing is written then.
        """
        from enorm_fx.step.apply import rescale_  # the step builds on plans

        rescale_(self, log_scales, optimizer)

    def select(self, predicate: Callable[[Group], bool]) -> Plan:
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

    def to_dict(self) -> dict[str, Any]:
        """Everything that was found, tensors aside, in JSON types."""
        from enorm_fx.report import to_dict  # reports build on plans

        return to_dict(self)

    def __str__(self) -> str:
        from enorm_fx.report import text  # reports build on plans

        return text(self)


def _is_of(pair: Pair, group: Group) -> bool:
    sides = pair.producer in group.producers and pair.consumer in group.consumers
    return sides and pair.channels == group.channels


def _reindexed(parameter: ScaledParameter, index: Tensor) -> ScaledParameter:
    terms = (Term(term.coefficient, index[term.index]) for term in parameter.terms)
    return replace(parameter, terms=tuple(t for t in terms if bool((t.index >= 0).any())))
