"""The immutable result of an analysis: which scales exist and which weights they move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from enorm_fx.plan.pairs import all_pairs, direct_pairs
from enorm_fx.plan.records import Blocked, Group, Pair, ScaledParameter
from enorm_fx.symmetry.solution import ScaleTerm

if TYPE_CHECKING:
    import networkx as nx
    from typing_extensions import Self

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class PlanData:
    """What an analysis found, as data: it knows nothing of reports and steps.

    Users hold `enorm_fx.Plan`, which puts the verbs on top of it.

    dataflow: the calls of both modes, where the model was traced in both; see `plan.graph`.
    shown:    how many of its nodes `graph` shows, those of the mode that the model was in.
    """

    model: nn.Module = field(repr=False)
    parameters: tuple[ScaledParameter, ...]
    groups: tuple[Group, ...]
    blocked: tuple[Blocked, ...]
    num_scales: int
    exact: bool
    dataflow: nx.DiGraph = field(repr=False)
    shown: int | None
    tracer: str
    inputs: tuple[tuple[Any, ...], dict[str, Any]] = field(repr=False)
    notes: tuple[str, ...] = ()
    _derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def graph(self) -> nx.DiGraph:
        """The dataflow in the mode that the model was in.

        The attributes of its nodes are those of `enorm_fx.plan.graph`.
        """
        return self._once("graph", self._shown_part)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every producer of a group with every consumer that what it produces reaches.

        In execution order. There may be as many as the square of a group's weights; they are
        found when they are first asked for.
        """
        return self._once("pairs", lambda: all_pairs(self.dataflow, self.groups))

    @property
    def direct_pairs(self) -> tuple[Pair, ...]:
        """The pairs between which no other producer or consumer of their group lies.

        In execution order: what tables, JSON and drawings show.
        """
        return self._once("direct_pairs", lambda: direct_pairs(self.dataflow, self.groups))

    def select(self, predicate: Callable[[Group], bool]) -> Self:
        """The plan with only the groups for which predicate(group) is true.

        The factors of the other groups stay 1 in it. Scales are numbered anew.
        """
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
        dataflow = self.dataflow.copy()
        for _, data in dataflow.nodes(data=True):
            data["groups"] = tuple(number[g] for g in data["groups"] if g in number)
        return replace(
            self,
            parameters=tuple(_reindexed(parameter, index) for parameter in self.parameters),
            groups=tuple(groups),
            num_scales=start,
            dataflow=dataflow,
        )

    def _shown_part(self) -> nx.DiGraph:
        if self.shown is None:
            return self.dataflow
        return self.dataflow.subgraph([n for n in self.dataflow if n < self.shown]).copy()

    def _once(self, name: str, derive: Callable[[], _T]) -> _T:
        """A property that is derived when it is first asked for, and kept."""
        if name not in self._derived:
            self._derived[name] = derive()
        kept: _T = self._derived[name]
        return kept


def _reindexed(parameter: ScaledParameter, index: Tensor) -> ScaledParameter:
    """A parameter with its scales numbered anew; index -1 stands for scales that are left out."""
    terms = (ScaleTerm(term.coefficient, index[term.index]) for term in parameter.terms)
    return replace(parameter, terms=tuple(t for t in terms if bool((t.index >= 0).any())))
