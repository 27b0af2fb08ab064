"""From the solution of the equations to scales that count: live, independent, in groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from enorm_fx.symmetry.labels import Equations, LabelTerm, distinct, end_to_end, term_blocks
from enorm_fx.symmetry.solution import ScaleTerm, connected, eliminate, merge_repeated

_DENOMINATOR = 720720  # makes integers of every fraction that roots and squares lead to


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """The scales of a plan.

    index:  (size,) int64: variable -> position in u, -1 for variables that are no scale.
    groups: channels of each group; its scales follow each other in u.
    """

    index: Tensor
    groups: tuple[int, ...]


def build_basis(
    size: int,
    parameters: dict[str, tuple[ScaleTerm, ...]],
    counted: Iterable[tuple[ScaleTerm, ...]] | None = None,
) -> Basis:
    """Choose the scales: free variables that move a parameter, without redundant directions.

    size: number of variables; parameters: name -> terms, in execution order; counted: the terms of
    those parts of them that make a scale count (one that moves others alone stays at zero); None:
    all of all.
    """
    compact = {
        name: tuple(ScaleTerm(t.coefficient, distinct([t.index])[0]) for t in terms)
        for name, terms in parameters.items()
    }
    live = torch.zeros(size + 1, dtype=torch.bool)  # the last entry stands for index -1
    redundant = _redundant(size, parameters.values() if counted is None else counted, live)
    live[redundant] = False
    return _group(size, compact, live[:size])


def _redundant(size: int, parameters: Iterable[tuple[ScaleTerm, ...]], live: Tensor) -> Tensor:
    """Variables to leave out because some direction of u moves no weight at all.

    Marks in `live` every variable that moves something. A direction moves nothing if every
    parameter f(i) + g(j) has constant f and constant g that add up to zero. So variables along
    one axis of a parameter are one unknown (a connected component), with one equation per
    parameter; those few are eliminated exactly.
    """
    alike: list[Tensor] = []  # ids that all scale one axis of one parameter
    base: list[list[tuple[int, int]]] = []
    mixed: list[Equations] = []
    for terms in parameters:
        coefficients = {id(t.index): round(t.coefficient * _DENOMINATOR) for t in terms}
        row: dict[int, int] = {}
        for block in term_blocks([LabelTerm(1, t.index) for t in terms]) if terms else ():
            weights = [coefficients[id(t.ids)] for t in block]
            arrays = torch.broadcast_tensors(*distinct([t.ids for t in block]))
            ids = [i.reshape(-1) for i in arrays]
            for weight, i in zip(weights, ids, strict=True):
                row[int(i[0])] = row.get(int(i[0]), 0) + weight
            if len(ids) == 1:
                alike.append(ids[0])
            else:
                mixed.append(_differences(ids, weights))
                moved, weight_ = merge_repeated(mixed[-1])
                live[moved[weight_ != 0]] = True
        base.append([(v, w) for v, w in row.items() if w and v >= 0])
    live[[variable for row in base for variable, _ in row]] = True
    _mark_varying(alike, live)
    component = _joined(size, alike)
    known = component == component[size]  # together with something pinned
    longest = max(map(len, base), default=0)
    padded = torch.tensor([[*row, *[(-1, 0)] * (longest - len(row))] for row in base])
    if padded.numel():
        mixed.append(Equations(padded[..., 1].T, padded[..., 0].T, 0))
    # One variable of each free component, its first, is set to zero: that fixes the direction.
    return _unsettled(size, mixed, component, known, live)


def _mark_varying(arrays: list[Tensor], live: Tensor) -> None:
    """Mark, in place, the variables of arrays that have more than one."""
    first = torch.tensor([int(ids[0]) for ids in arrays], dtype=torch.int64)
    varies = torch.zeros(len(arrays), dtype=torch.bool)
    for ids, number in end_to_end(arrays):
        varies[number[ids != first[number]]] = True
        live[ids[varies[number]]] = True


def _joined(size: int, alike: list[Tensor]) -> Tensor:
    """(size + 1,) int64: for each variable the first of those that it is alike with.

    The last entry stands for id -1. Arrays are few and long, so it is arrays that are joined: each
    with those that own one of its variables already.
    """
    owner = torch.full((size + 1,), -1, dtype=torch.int32)
    owner[-1] = len(alike)
    first = torch.full((len(alike) + 1,), size)  # of each array, then of all that it is joined with
    links = []
    for ids, number in end_to_end(alike):
        first.scatter_reduce_(0, number, torch.where(ids < 0, size, ids), "amin")
        free = owner[ids] < 0
        owner[ids[free]] = number[free].int()  # of several, one
        others = owner[ids].long()
        pairs = (number * (len(alike) + 1) + others)[others != number]
        pairs = pairs.unique_consecutive().unique()
        links.append(torch.stack([pairs // (len(alike) + 1), pairs % (len(alike) + 1)]))
    array = connected(len(alike) + 1, links)
    first.scatter_reduce_(0, array, first.clone(), "amin")
    joined = first[array]
    variables = torch.arange(size + 1)
    owned = owner >= 0
    variables[owned] = joined[owner[owned]]
    return variables


def _differences(ids: list[Tensor], weights: list[int]) -> Equations:
    """Rows f(i) - f(0) of a sum of several terms along the same axes."""
    stacked = torch.stack(ids)
    weight = torch.tensor(weights).unsqueeze(1)
    spread = torch.cat([weight, -weight]).expand(-1, stacked.shape[1])
    return Equations(spread, torch.cat([stacked, stacked[:, :1].expand_as(stacked)]), 0)


def _unsettled(
    size: int, rows: list[Equations], component: Tensor, known: Tensor, live: Tensor
) -> Tensor:
    """Components that stay free when every row must vanish.

    A component that some row has alone is settled at zero; with it, others follow. What is left
    is eliminated exactly.
    """
    settled = torch.zeros(size + 1, dtype=torch.bool)
    settled[component[known]] = True
    used = torch.zeros(size + 1, dtype=torch.bool)
    used[component[live]] = True  # also where no row is left, as in u[i] - u[j]
    pending = []
    for equations in rows:
        ids = torch.where(equations.ids < 0, size, equations.ids)
        pending.append(Equations(equations.weights, component[ids], 0))
    progress = True
    while pending and progress:
        progress = False
        still = []
        for equations in pending:
            weights = torch.where(settled[equations.ids], 0, equations.weights)
            ids, weights = merge_repeated(Equations(weights, equations.ids, 0))
            count = (weights != 0).sum(dim=0)
            single = (weights != 0) & (count == 1)
            if bool(single.any()):
                settled[ids[single]] = True
                progress = True
            if bool((count > 1).any()):
                still.append(Equations(weights[:, count > 1], ids[:, count > 1], 0))
        pending = still
    sums, zeros = eliminate(pending)
    used &= ~settled
    used[[*sums, *zeros]] = False
    return used.nonzero().squeeze(1)


def _group(size: int, parameters: dict[str, tuple[ScaleTerm, ...]], live: Tensor) -> Basis:
    """Variables that move the same parameters in the same way, next to each other in u."""
    scales = live.nonzero().squeeze(1)
    if not len(scales):
        return Basis(torch.full((size,), -1), ())
    kind, first = _kinds(size, parameters, scales)
    # A group's place: the parameter that it moves first, then its first variable.
    kinds = int(kind.max()) + 1
    parameter = torch.full((kinds,), len(parameters) + 1)
    parameter[kind] = first.long()  # the same for all variables of a kind
    variable = torch.full((kinds,), size).scatter_reduce_(0, kind.long(), scales, "amin")
    rank = torch.empty(kinds, dtype=torch.int32)
    order = (parameter * (size + 1) + variable).argsort()  # kinds that nothing is of come last
    rank[order] = torch.arange(kinds, dtype=torch.int32)
    group = rank[kind]
    del kind, first  # arrays of all scales of a model are what takes memory here
    index = torch.full((size,), -1)
    index[scales[group.argsort(stable=True)]] = torch.arange(len(scales))
    return Basis(index, tuple(torch.bincount(group).tolist()))


def _kinds(
    size: int, parameters: dict[str, tuple[ScaleTerm, ...]], scales: Tensor
) -> tuple[Tensor, Tensor]:
    """For each of some variables which are like it, and the position of the first parameter that it
    moves: two arrays of the shape of `scales`."""
    kind = torch.zeros(size + 1, dtype=torch.int32)  # variables of one kind are alike so far
    kinds = 1
    for terms in parameters.values():
        for ids, times in _ways(terms):
            key = kind[ids].long()
            if times is not None:
                key = key * (int(times.max()) + 1) + times
            lowest, highest = key.aminmax()
            if bool(lowest == highest):  # as it is for most
                kind[ids] = kinds
                kinds += 1
            else:
                values, inverse = key.unique(return_inverse=True)
                kind[ids] = kinds + inverse.int()
                kinds += len(values)
    first = torch.full((size + 1,), len(parameters), dtype=torch.int32)
    places = [k for k, terms in enumerate(parameters.values()) for _ in terms]
    position = torch.tensor(places, dtype=torch.int32)
    indices = (term.index for terms in parameters.values() for term in terms)
    for ids, number in end_to_end(indices):
        first.scatter_reduce_(0, torch.where(ids < 0, size, ids), position[number], "amin")
    return kind[scales], first[scales]


def _ways(terms: tuple[ScaleTerm, ...]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """For each coefficient and axes with which a parameter is moved: the variables that do so, and
    by how many terms (None: one each)."""
    ways: dict[tuple[float, tuple[int, ...]], list[Tensor]] = {}
    for term in terms:
        axes = tuple(a for a, n in enumerate(term.index.shape) if n > 1)
        ways.setdefault((term.coefficient, axes), []).append(term.index.reshape(-1))
    for arrays in ways.values():
        if len(arrays) == 1:
            yield arrays[0], None
        else:
            yield torch.cat([ids.unique() for ids in arrays]).unique(return_counts=True)
