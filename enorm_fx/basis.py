"""From the solution of the equations to scales that count: live, independent, in groups."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from enorm_fx.labels import Equations, LabelTerm, term_blocks
from enorm_fx.plan import Term
from enorm_fx.solve import eliminate


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """The scales of a plan.

    index:  (size,) int64: variable -> position in u, -1 for variables that are no scale.
    groups: channels of each group; its scales follow each other in u.
    """

    index: Tensor
    groups: tuple[int, ...]


def build_basis(size: int, parameters: dict[str, tuple[Term, ...]]) -> Basis:
    """Choose the scales: free variables that move a parameter, without redundant directions.

    size: number of variables; parameters: name -> terms, in execution order.
    """
    rows = {name: _rows(terms) for name, terms in parameters.items() if terms}
    live = torch.zeros(size, dtype=torch.bool)
    nothing = torch.zeros(size, dtype=torch.bool)
    for equations in (e for block in rows.values() for e in block):
        ids, weights = _merge(equations, nothing)
        live[ids[weights != 0]] = True
    live[_redundant(size, list(rows.values()))] = False
    return _group(size, parameters, live)


def _rows(terms: tuple[Term, ...]) -> list[Equations]:
    """Independent rows that span the log scales of a parameter's entries.

    A matrix f(i) + g(j) is spanned by f(0) + g(0), f(i) - f(0) and g(j) - g(0).
    """
    blocks = term_blocks([LabelTerm(1, t.index) for t in terms])
    coefficients = {id(t.index): round(t.coefficient * _DENOMINATOR) for t in terms}
    result: list[Equations] = []
    base: list[tuple[int, int]] = []
    for block in blocks:
        ids = torch.stack([x.reshape(-1) for x in torch.broadcast_tensors(*(t.ids for t in block))])
        weights = torch.tensor([coefficients[id(t.ids)] for t in block]).unsqueeze(1)
        ids = ids.unique(dim=1) if ids.shape[1] > 1 else ids
        first = ids[:, :1].expand_as(ids)
        spread = torch.cat([weights, -weights]).expand(-1, ids.shape[1])
        result.append(Equations(spread, torch.cat([ids, first]), 0))
        base += zip(weights[:, 0].tolist(), ids[:, 0].tolist(), strict=True)
    weight, variable = torch.tensor(base).T.unsqueeze(-1)
    result.append(Equations(weight, variable, 0))
    return result


_DENOMINATOR = 720720  # makes integers of every fraction that roots and squares lead to


def _redundant(size: int, rows: list[list[Equations]]) -> Tensor:
    """Variables to leave out because some direction moves no weight at all.

    A variable that some entry has alone is settled; with it settled, others follow. What never
    settles is eliminated exactly.
    """
    settled = torch.zeros(size, dtype=torch.bool)
    pending = [e for block in rows for e in block]
    while True:
        open_rows = []
        progress = False
        for equations in pending:
            ids, weights = _merge(equations, settled)
            count = (weights != 0).sum(dim=0)
            single = (weights != 0) & (count == 1)
            if bool(single.any()):
                settled[ids[single]] = True
                progress = True
            if bool((count > 1).any()):
                open_rows.append(Equations(weights[:, count > 1], ids[:, count > 1], 0))
        pending = open_rows
        if not progress or not pending:
            break
    if not pending:
        return torch.zeros(0, dtype=torch.int64)
    seen = torch.cat([e.ids[e.weights != 0] for e in pending]).unique()
    sums, zeros = eliminate(pending)
    return torch.tensor([v for v in seen.tolist() if v not in sums and v not in zeros])


def _merge(equations: Equations, settled: Tensor) -> tuple[Tensor, Tensor]:
    """Drop pinned and settled variables, add up repeated ones."""
    ids, order = equations.ids.sort(dim=0)
    weights = equations.weights.gather(0, order)
    weights = torch.where((ids < 0) | settled[ids], 0, weights)
    for k in range(len(ids) - 1):
        same = ids[k] == ids[k + 1]
        weights[k + 1] += torch.where(same, weights[k], 0)
        weights[k] = torch.where(same, 0, weights[k])
    return ids, weights


def _group(size: int, parameters: dict[str, tuple[Term, ...]], live: Tensor) -> Basis:
    """Variables that move the same parameters in the same way, next to each other in u."""
    signature = torch.zeros(size, dtype=torch.int64)
    first = torch.full((size,), len(parameters))
    for position, (name, terms) in enumerate(parameters.items()):
        for term in terms:
            ids = term.index.reshape(-1).unique()
            ids = ids[ids >= 0]
            axes = tuple(a for a, n in enumerate(term.index.shape) if n > 1)
            signature[ids] += _hash(name, term.coefficient, axes)
            first[ids] = torch.minimum(first[ids], torch.tensor(position))
    scales = live.nonzero().squeeze(1)
    _, inverse = signature[scales].unique(return_inverse=True)
    count = int(inverse.max()) + 1 if len(scales) else 0
    # A group's place: the parameter that it moves first, then its first variable.
    key = first[scales] * size + scales
    place = torch.full((count,), torch.iinfo(torch.int64).max)
    place.scatter_reduce_(0, inverse, key, "amin")
    rank = torch.empty(count, dtype=torch.int64)
    rank[place.argsort()] = torch.arange(count)
    order = (rank[inverse] * size + scales).argsort()
    index = torch.full((size,), -1)
    index[scales[order]] = torch.arange(len(scales))
    return Basis(index, tuple(torch.bincount(rank[inverse], minlength=count).tolist()))


def _hash(*key: object) -> int:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
