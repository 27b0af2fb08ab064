"""The solver against dense linear algebra, and its small parts."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from enorm_fx.symmetry.basis import build_basis
from enorm_fx.symmetry.labels import Equations, LabelTerm, System
from enorm_fx.symmetry.solution import ScaleTerm, Solution, connected, eliminate, solve

Row = list[tuple[int, int]]  # (coefficient, variable)


def system_of(size: int, rows: list[Row]) -> System:
    system = System()
    variables = system.fresh(size)
    for row in rows:
        system.zero([LabelTerm(c, variables[v].reshape(1)) for c, v in row])
    return system


def values(solution: Solution, count: int, u: Tensor) -> Tensor:
    """Every variable, from values for the free ones."""
    padded = torch.cat([u, u.new_zeros(1)])
    result = torch.zeros(count, dtype=u.dtype)
    for term in solution.terms([LabelTerm(1, torch.arange(count))]):
        result += term.coefficient * padded[term.index]
    return result


def dense(size: int, rows: list[Row]) -> Tensor:
    matrix = torch.zeros(len(rows), size + 1, dtype=torch.float64)
    for i, row in enumerate(rows):
        for c, v in row:
            matrix[i, v + 1] += c
    return matrix


def free_count(solution: Solution, count: int) -> int:
    """The rank of the map from free variables to all."""
    columns = [values(solution, count, e) for e in torch.eye(count, dtype=torch.float64)]
    return int(torch.linalg.matrix_rank(torch.stack(columns)))


entry = st.tuples(st.sampled_from([-3, -2, -1, -1, 1, 1, 2, 3]), st.integers(0, 8))
few = st.lists(entry, min_size=1, max_size=2)
more = st.lists(entry, min_size=1, max_size=4)


def test_what_is_multiplied_and_divided_alike_is_no_term() -> None:
    system = System()
    a, b, c = system.fresh(1), system.fresh(3), system.fresh(3)
    system.zero([LabelTerm(1, b), LabelTerm(-1, c)])
    solution = solve(system)

    def shown(*terms: tuple[int, Tensor]) -> list[tuple[float, list[int]]]:
        found = solution.terms([LabelTerm(*term) for term in terms])
        return [(t.coefficient, t.index.tolist()) for t in found]

    assert (
        shown((1, b), (-1, c)) == shown((2, a), (-2, a)) == shown((1, a.expand(3)), (-1, a)) == []
    )
    one = int(a)
    assert shown((1, a), (-1, torch.stack([a, b[:1], a]).squeeze(1))) == [
        (1.0, [one]),
        (-1.0, [one, int(solution.root[b[0]]), one]),
    ]
    mixed = torch.cat([b[:1], c[:2]])
    assert shown((1, b), (-1, mixed)) == [
        (1.0, [-1, *solution.root[b[1:]].tolist()]),
        (-1.0, [-1, *solution.root[b[:2]].tolist()]),
    ]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows=st.lists(few | more, max_size=12), seed=st.integers(0, 100))
def test_the_solution_solves_and_nothing_is_missing(rows: list[Row], seed: int) -> None:
    size = 9
    system = system_of(size, rows)
    solution = solve(system)
    random = torch.Generator().manual_seed(seed)
    u = torch.randn(system.size, dtype=torch.float64, generator=random)
    found = values(solution, size + 1, u)
    matrix = dense(size, rows)
    assert float((matrix @ found).abs().max()) < 1e-9 if rows else True
    rank = int(torch.linalg.matrix_rank(matrix)) if rows else 0
    assert float(found[0]) == 0  # the variable that fills up arrays of ids
    assert free_count(solution, size + 1) == size - rank


@settings(max_examples=60, deadline=None, derandomize=True)
@given(edges=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=14))
def test_components_are_those_of_a_plain_search(edges: list[tuple[int, int]]) -> None:
    label = list(range(12))
    for _ in range(12):
        for a, b in edges:
            label[a] = label[b] = min(label[a], label[b])
    given_edges = [torch.tensor(edges).T] if edges else []
    assert connected(12, given_edges).tolist() == label


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[(1, 0), (-1, 1)]], [1, 1]),
        ([[(1, 0), (1, 1)]], [1, -1]),
        ([[(1, 0), (1, 1)], [(1, 0), (-1, 1)]], [0, 0]),
        ([[(2, 0), (-1, 1)]], [1, 2]),
        ([[(3, 0), (2, 1)]], [2, -3]),
        ([[(2, 0)]], [0, None]),
        ([[(1, 0), (-1, 0)]], [None, None]),
    ],
)
def test_two_variables(rows: list[Row], expected: list[int | None]) -> None:
    """expected: values up to a common factor; None for a variable that stays free."""
    solution = solve(system_of(2, rows))
    u = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = values(solution, 3, u)[1:]
    fixed = [(f, e) for f, e in zip(found.tolist(), expected, strict=True) if e is not None]
    if len(fixed) == 2:
        assert fixed[0][0] * fixed[1][1] == pytest.approx(fixed[1][0] * fixed[0][1])
        assert (fixed[0][0] == 0) == (expected[0] == 0)
    assert free_count(solution, 3) == len(expected) - int(torch.linalg.matrix_rank(dense(2, rows)))


def test_elimination_is_exact_in_fractions() -> None:
    rows = Equations(
        torch.tensor([[3, 1], [-7, 1], [1, 1]]), torch.tensor([[0, 2], [1, 3], [2, 4]]), 0
    )
    sums, zeros = eliminate([rows])
    assert zeros == []
    assert all(isinstance(c, Fraction) for parts in sums.values() for c, _ in parts)
    x = {0: Fraction(5), 1: Fraction(2), 2: Fraction(-1), 3: Fraction(4), 4: Fraction(9)}
    for variable, parts in sums.items():
        x[variable] = sum((c * x[w] for c, w in parts), Fraction(0))
    assert 3 * x[0] - 7 * x[1] + x[2] == 0
    assert x[2] + x[3] + x[4] == 0


def test_a_contradiction_of_three_pins_all_of_them() -> None:
    rows: list[Row] = [
        [(1, 0), (1, 1), (1, 2)], [(1, 0), (1, 1), (-1, 2)], [(1, 0), (-1, 1), (1, 2)]
    ]  # fmt: skip
    assert free_count(solve(system_of(3, rows)), 4) == 0


# --- from solutions to scales ------------------------------------------------------------------


def along(axis: int, *ids: int) -> Tensor:
    return torch.tensor(ids).reshape(-1, 1) if axis == 0 else torch.tensor(ids).reshape(1, -1)


def test_directions_that_move_nothing_are_no_scales() -> None:
    only = {"w": (ScaleTerm(1.0, along(0, 0, 1)), ScaleTerm(-1.0, along(1, 2, 3, 4)))}
    assert sum(build_basis(5, only).groups) == 2 + 3 - 1  # r + 1, s + 1 moves no weight


def test_variables_that_move_nothing_are_no_scales() -> None:
    basis = build_basis(6, {"w": (ScaleTerm(1.0, torch.tensor([0, 1, -1])),)})
    assert sum(basis.groups) == 2
    assert basis.index[2:].tolist() == [-1] * 4


def test_scales_of_one_group_follow_each_other() -> None:
    basis = build_basis(
        6,
        {
            "a": (ScaleTerm(1.0, along(0, 1, 4)),),
            "b": (ScaleTerm(1.0, along(0, 2, 5)), ScaleTerm(-1.0, along(1, 1, 4))),
            "c": (ScaleTerm(-1.0, along(1, 2, 5)),),
        },
    )
    assert basis.groups == (2, 2)
    assert basis.index[[1, 4, 2, 5]].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_a_group_is_what_moves_the_same_parameters_alike(seed: int) -> None:
    """Against a plain table: which parameters each variable moves, with what, along which axes."""
    random = torch.Generator().manual_seed(seed)

    def drawn(axis: int) -> Tensor:
        return along(axis, *torch.randint(-1, 9, (4,), generator=random).tolist())

    parameters = {
        name: tuple(ScaleTerm(c, drawn(axis)) for c, axis in ((1.0, 0), (-1.0, 1), (1.0, 0)))
        for name in "abc"
    }
    basis = build_basis(9, parameters)
    alike: dict[int, list[tuple[str, float, int, int]]] = {v: [] for v in range(9)}
    for name, terms in parameters.items():
        for coefficient, axis in ((1.0, 0), (-1.0, 1)):
            shape = (4, 1) if axis == 0 else (1, 4)
            same = [
                t.index for t in terms if (t.coefficient, t.index.shape) == (coefficient, shape)
            ]
            for v in range(9):
                times = sum(bool((i == v).any()) for i in same)
                alike[v].append((name, coefficient, axis, times))
    scales = sorted((v for v in range(9) if basis.index[v] >= 0), key=lambda v: basis.index[v])
    kinds = [tuple(alike[v]) for v in scales]
    assert list(basis.groups) == [len(list(same)) for _, same in itertools.groupby(kinds)]
    assert len(set(kinds)) == len(basis.groups)


weight = st.tuples(
    st.lists(st.integers(-1, 5), min_size=2, max_size=3),
    st.lists(st.integers(-1, 5), min_size=1, max_size=3),
    st.sampled_from([1.0, -1.0, 2.0, 0.5]),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(weights=st.lists(weight, min_size=1, max_size=4))
def test_scales_are_a_basis_of_what_moves_weights(
    weights: list[tuple[list[int], list[int], float]],
) -> None:
    parameters = {
        str(k): (ScaleTerm(1.0, along(0, *rows)), ScaleTerm(-c, along(1, *columns)))
        for k, (rows, columns, c) in enumerate(weights)
    }
    matrix = torch.cat([_exponents(terms, 6) for terms in parameters.values()])
    basis = build_basis(6, parameters)
    chosen = (basis.index >= 0).nonzero().squeeze(1)
    rank = int(torch.linalg.matrix_rank(matrix))
    assert sum(basis.groups) == len(chosen) == rank
    assert int(torch.linalg.matrix_rank(matrix[:, chosen])) == rank if rank else True
    assert sorted(basis.index[chosen].tolist()) == list(range(rank))


def _exponents(terms: tuple[ScaleTerm, ...], size: int) -> Tensor:
    """Rows: entries of a matrix; columns: variables."""
    shape = torch.broadcast_shapes(*(t.index.shape for t in terms))
    result = torch.zeros(shape.numel(), size + 1, dtype=torch.float64)
    for term in terms:
        index = term.index.expand(shape).reshape(-1)
        result[torch.arange(len(index)), index] += term.coefficient
    return result[:, :-1]
