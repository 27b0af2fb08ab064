"""Solve the equations between scale variables.

Nearly all equations say x = 0, x = y or x = -y. Those are solved at once for all variables, as
connected components of a graph in which every variable stands twice, for x and for -x. The few
that remain (relu(gate) * up meeting a residual stream, squares) are eliminated one by one over
the rationals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from operator import itemgetter

import torch
from torch import Tensor

from enorm_fx.symmetry.labels import Equations, LabelTerm, System

_Parts = tuple[tuple[Fraction, int], ...]  # coefficient, free variable


@dataclass(frozen=True, slots=True, eq=False)
class ScaleTerm:
    """One factor of a parameter: entry e is multiplied by exp(coefficient * u[index[e]]).

    index: int64, as many axes as the parameter, each of size 1 (broadcast) or of the
    parameter's size; -1 where nothing may be rescaled. coefficient is dimensionless.
    """

    coefficient: float
    index: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Every variable in terms of free ones.

    root:   (size,) int64: the variable that stands for this one, -1 where it is zero (pinned).
    sign:   (size,) int8: +1 or -1 times the root.
    sums:   roots that are themselves sums of free roots, after elimination.
    """

    root: Tensor
    sign: Tensor
    sums: dict[int, _Parts] = field(default_factory=dict)

    def terms(self, terms: Sequence[LabelTerm]) -> tuple[ScaleTerm, ...]:
        """A label in free variables: one ScaleTerm for each coefficient that occurs."""
        parts: dict[Fraction, list[Tensor]] = {}
        for term in terms:
            for times, index in self._with_sign(term):
                for factor, part in self._expand(index):
                    parts.setdefault(factor * times, []).append(part)
        cancelled = False
        for coefficient, group in parts.items():
            if coefficient > 0 and -coefficient in parts:
                _cancel(group, parts[-coefficient])
                cancelled = True
        return tuple(
            ScaleTerm(float(coefficient), part)
            for coefficient, group in parts.items()
            if coefficient
            for part in group
            if not cancelled or bool((part >= 0).any())
        )

    def _with_sign(self, term: LabelTerm) -> list[tuple[int, Tensor]]:
        """(coefficient, roots), the lower coefficient first; -1 where a root has the other one."""
        ids = term.ids.reshape(-1)
        roots = self.root[ids].reshape(term.ids.shape)
        if not roots.numel() or int(roots.max()) < 0:
            return []
        signs = self.sign[ids].reshape(term.ids.shape)
        lowest, highest = (int(end) for end in signs.aminmax())
        if lowest == highest:
            return [(lowest * term.coefficient, roots)]
        both = ((sign, torch.where(signs == sign, roots, -1)) for sign in (1, -1))
        found = [(s * term.coefficient, part) for s, part in both if bool((part >= 0).any())]
        return sorted(found, key=itemgetter(0))

    def _expand(self, index: Tensor) -> list[tuple[Fraction, Tensor]]:
        """Replace roots that are sums; entries with a sum move to terms of their own."""
        if not self.sums:
            return [(Fraction(1), index)]
        summed = torch.tensor(sorted(self.sums))
        special = torch.isin(index, summed)
        if not bool(special.any()):
            return [(Fraction(1), index)]
        result = [(Fraction(1), torch.where(special, -1, index))]
        longest = max(len(self.sums[int(r)]) for r in index[special].unique())
        for k in range(longest):
            parts: dict[Fraction, dict[int, int]] = {}
            for r in index[special].unique().tolist():
                if k < len(self.sums[r]):
                    coefficient, free = self.sums[r][k]
                    parts.setdefault(coefficient, {})[r] = free
            for coefficient, replace in parts.items():
                table = torch.full((int(summed[-1]) + 1,), -1)
                table[torch.tensor(list(replace))] = torch.tensor(list(replace.values()))
                chosen = torch.where(special, index, summed[-1])
                part = torch.where(special, table[chosen], -1)
                result.append((coefficient, part))
        return [(c, part) for c, part in result if bool((part >= 0).any())]


def _cancel(plus: list[Tensor], minus: list[Tensor]) -> None:
    """Take out, in place, what two arrays multiply and divide alike: entries, or one for all."""
    for i, a in enumerate(plus):
        for j, b in enumerate(minus):
            if a.shape != b.shape and min(a.numel(), b.numel()) > 1:
                continue
            same = (a == b) & (a >= 0)
            if a.shape == b.shape or bool(same.all()):
                a = plus[i] = a.masked_fill(same if a.shape == b.shape else same.all(), -1)
                minus[j] = b.masked_fill(same if a.shape == b.shape else same.all(), -1)


def solve(system: System) -> Solution:
    """The general solution of all equations of a system."""
    pinned = torch.zeros(system.size, dtype=torch.bool)
    rest = _spread_pins(system.equations, pinned)
    root, sign = torch.arange(system.size), torch.ones(system.size, dtype=torch.int8)
    used = torch.zeros(system.size, dtype=torch.bool)
    for equations in rest:
        used[equations.ids.reshape(-1)] = True
    # Few variables occur in what is left; it is solved in them alone, numbered from 0.
    name = used.nonzero().squeeze(1)
    number = torch.zeros(system.size, dtype=torch.int64)
    number[name] = torch.arange(len(name))
    small = [Equations(e.weights, number[e.ids], e.origin) for e in rest]
    known = torch.nonzero(pinned[name]).squeeze(1)
    small.append(Equations(torch.ones_like(known)[None], known[None], 0))
    small_root, small_sign, small_sums = _solve_all(small, len(name))
    root[name] = torch.where(small_root >= 0, name[small_root], -1)
    sign[name] = small_sign.to(torch.int8)
    root[pinned] = -1
    sums = {
        int(name[variable]): tuple((c, int(name[free])) for c, free in parts)
        for variable, parts in small_sums.items()
    }
    return Solution(root, sign, sums)


def _spread_pins(equations: Sequence[Equations], pinned: Tensor) -> list[Equations]:
    """Mark variables that are zero because all others of some equation are; return what is left.

    Most variables of a large model are pinned, nearly all of them within two passes. A pass goes
    through the equations in one direction; what would need more is left to the general solution.
    """
    waiting = []
    for e in equations:
        if len(e.ids) == 1:
            pinned[e.ids[0]] = True
        else:
            waiting.append(e)
    for _ in range(2):  # forwards, backwards
        waiting = [rest for e in waiting if (rest := _without_pinned(e, pinned)).ids.shape[1]]
        waiting.reverse()
    return waiting


def _without_pinned(equations: Equations, pinned: Tensor) -> Equations:
    """The rows with two free variables or more; one that is alone in its row becomes pinned."""
    free = ~pinned[equations.ids]
    count = free.sum(dim=0)
    single = free & (count == 1)
    if bool(single.any()):
        pinned[equations.ids[single]] = True
    open_ = count > 1
    if bool(open_.all()):
        return equations
    return Equations(equations.weights[:, open_], equations.ids[:, open_], equations.origin)


def _solve_all(hard: list[Equations], size: int) -> tuple[Tensor, Tensor, dict[int, _Parts]]:
    """(root, sign, sums) of `size` variables, see `Solution`."""
    label = torch.arange(2 * size + 1)  # 2v for v, 2v + 1 for -v, the last for zero
    hard = _joined_pairs(hard)
    while True:
        root, sign = _roots(label)
        edges: list[Tensor] = []
        hard = [rest for e in hard if (rest := _reduce(e, root, sign, edges)).ids.shape[1]]
        if not edges:
            break
        label = connected(len(label), (label[edge] for edge in edges))[label]
    sums, zeros = eliminate(hard)
    for variable in zeros:
        root[root == variable] = -1
    return root, sign, sums


def _joined_pairs(equations: list[Equations]) -> list[Equations]:
    """Equations of two terms, which most are, many at a time: each costs as much as all of them."""
    joined: list[Equations] = []
    waiting: list[Equations] = []
    rows = 0
    for e in [e for e in equations if len(e.ids) == 2]:
        waiting.append(e)
        rows += e.ids.shape[1]
        if rows >= _MANY_ROWS:
            joined.append(_as_one(waiting))
            waiting, rows = [], 0
    if waiting:
        joined.append(_as_one(waiting))
    return joined + [e for e in equations if len(e.ids) != 2]


def _as_one(equations: list[Equations]) -> Equations:
    weights = torch.cat([e.weights for e in equations], dim=1)
    return Equations(weights, torch.cat([e.ids for e in equations], dim=1), 0)


_MANY_ROWS = 1 << 18


def _roots(label: Tensor) -> tuple[Tensor, Tensor]:
    """(root, sign) of every variable; one that equals its own negative is zero: root -1."""
    plus, minus = label[0:-1:2], label[1:-1:2]
    return torch.where(plus == minus, -1, plus // 2), 1 - 2 * (plus % 2)


def _reduce(equations: Equations, root: Tensor, sign: Tensor, edges: list[Tensor]) -> Equations:
    """Rewrite rows in roots; rows that say x = 0 or x = +-y go to the edges.

    Returns the rows that say more.
    """
    signed = equations.weights * sign[equations.ids]
    ids, weights = merge_repeated(Equations(signed, root[equations.ids], equations.origin))
    # Terms that are left stand last, in at most as many rows as there are terms.
    order = (weights != 0).int().argsort(dim=0, stable=True)
    ids, weights = ids.gather(0, order), weights.gather(0, order)
    count = (weights != 0).sum(dim=0)
    single = count == 1
    if bool(single.any()):
        edges.append(_zero(ids[-1, single], 2 * len(root)))
    hard = count > 2
    if len(ids) > 1:
        even = weights[-1].abs() == weights[-2].abs()
        double = (count == 2) & even
        if bool(double.any()):
            opposite = (weights[-1] == weights[-2])[double].long()  # x + y = 0
            edges.append(_link(ids[-2, double], ids[-1, double], opposite))
        hard |= (count == 2) & ~even
    return Equations(weights[:, hard], ids[:, hard], equations.origin)


def _zero(x: Tensor, zero: int) -> Tensor:
    """Doubled ids of variables that are zero: both signs are tied to one node."""
    both = torch.cat([2 * x, 2 * x + 1])
    return torch.stack([both, torch.full_like(both, zero)])


def merge_repeated(equations: Equations) -> tuple[Tensor, Tensor]:
    """(ids, weights) with each variable once per row; those with id -1 are dropped (weight 0)."""
    ids, order = equations.ids.sort(dim=0)
    weights = equations.weights.gather(0, order)
    weights = torch.where(ids < 0, 0, weights)
    for k in range(len(ids) - 1):
        same = ids[k] == ids[k + 1]
        weights[k + 1] += torch.where(same, weights[k], 0)
        weights[k] = torch.where(same, 0, weights[k])
    return ids, weights


def _link(x: Tensor, y: Tensor, opposite: Tensor) -> Tensor:
    """Doubled ids (2v for v, 2v + 1 for -v) of pairs with x = y, or x = -y."""
    plus = torch.stack([2 * x, 2 * y + opposite])
    minus = torch.stack([2 * x + 1, 2 * y + 1 - opposite])
    return torch.cat([plus, minus], dim=1)


def connected(size: int, edges: Iterable[Tensor]) -> Tensor:
    """For each of `size` nodes the smallest node of its connected component, int64.

    edges: int64 tensors of shape (2, n).
    """
    short = torch.int32 if size <= torch.iinfo(torch.int32).max else torch.int64
    label = torch.arange(size, dtype=short)
    narrow = [edge.to(short) for edge in edges]  # a large model has millions of edges
    if not narrow:
        return label.long()
    a, b = torch.cat(narrow, dim=1)
    del narrow
    while True:
        low, high = torch.minimum(label[a], label[b]), torch.maximum(label[a], label[b])
        active = low != high
        if not bool(active.any()):
            return label.long()
        a, b = a[active], b[active]
        label.scatter_reduce_(0, high[active].long(), low[active], "amin")
        while not torch.equal(shorter := label[label], label):  # pointer jumping
            label = shorter


_Sum = dict[int, Fraction]


def eliminate(hard: list[Equations]) -> tuple[dict[int, _Parts], list[int]]:
    """Gaussian elimination over the rationals of the few equations that are left.

    Returns (variable -> sum of free variables, variables that are zero).
    """
    pivots: dict[int, _Sum] = {}
    for equations in hard:
        for row in torch.cat([equations.weights, equations.ids]).T.unique(dim=0).tolist():
            terms = len(row) // 2
            total: _Sum = {}
            for weight, variable in zip(row[:terms], row[terms:], strict=True):
                if weight:
                    _add(total, pivots.get(variable, {variable: Fraction(1)}), Fraction(weight))
            if not total:
                continue
            # The newest variable with a unit coefficient keeps the coefficients integers.
            pivot = max(total, key=lambda v: (abs(total[v]) == 1, v))
            scale = -1 / total.pop(pivot)
            expression = {v: c * scale for v, c in total.items()}
            for other in pivots.values():
                if pivot in other:
                    _add(other, expression, other.pop(pivot))
            pivots[pivot] = expression
    sums = {v: tuple((c, w) for w, c in sorted(e.items())) for v, e in pivots.items() if e}
    return sums, [v for v, e in pivots.items() if not e]


def _add(total: _Sum, other: _Sum, factor: Fraction) -> None:
    for variable, coefficient in other.items():
        value = total.get(variable, Fraction(0)) + factor * coefficient
        if value:
            total[variable] = value
        else:
            total.pop(variable, None)
