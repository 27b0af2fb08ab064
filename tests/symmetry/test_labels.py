"""Labels: sums of terms, and the equations that rules ask for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from enorm_fx.symmetry.labels import (
    Label,
    LabelTerm,
    System,
    add,
    combine,
    distinct,
    expand_dims,
    squeeze_constant,
    term_blocks,
)
from enorm_fx.symmetry.solution import solve


def ids(*values: int, axis: int = 0, ndim: int = 1) -> Tensor:
    shape = [1] * ndim
    shape[axis] = len(values)
    return torch.tensor(values).reshape(shape)


def test_terms_with_the_same_ids_add_up_and_cancel() -> None:
    a, b = ids(0, 1), ids(2, 3)
    assert combine([LabelTerm(1, a), LabelTerm(-1, a.clone())]) == ()
    (kept,) = combine([LabelTerm(2, a), LabelTerm(-1, a), LabelTerm(1, b), LabelTerm(-1, b)])
    assert (kept.coefficient, kept.ids.tolist()) == (1, [0, 1])
    assert len(combine([LabelTerm(1, a), LabelTerm(1, b)])) == 2
    assert len(combine([LabelTerm(1, a), LabelTerm(-1, a.reshape(1, 2))])) == 2


def test_a_product_adds_labels_and_a_power_multiplies_them() -> None:
    x = Label((2, 3), (LabelTerm(1, ids(0, 1, 2, axis=1, ndim=2)),))
    y = Label((3,), (LabelTerm(1, ids(3, 4, 5)),))
    product = add((2, 3), x, y)
    assert [t.ids.shape for t in product.terms] == [(1, 3), (1, 3)]
    assert add((2, 3), x, -x).terms == ()
    assert add((2, 3), x, x).terms[0].coefficient == 2
    assert (-x).times(3).terms[0].coefficient == -3


def test_zeros_times_anything_are_zeros() -> None:
    zeros = Label((3,), wild=True)
    assert add((3,), zeros, Label((3,), (LabelTerm(1, ids(1, 2, 3)),))).wild


def test_ids_broadcast_as_tensors_do() -> None:
    assert expand_dims(ids(4, 5), 3).shape == (1, 1, 2)
    constant = torch.tensor([[7, 8], [7, 8]])
    assert squeeze_constant(constant).tolist() == [[7, 8]]
    assert squeeze_constant(torch.tensor([[7, 7]])).shape == (1, 1)
    assert squeeze_constant(torch.tensor([[7, 8], [8, 7]])).shape == (2, 2)


def test_variation_along_an_axis() -> None:
    label = Label((2, 3), (LabelTerm(1, ids(0, 1, 2, axis=1, ndim=2)),))
    assert [label.varies(axis) for axis in (0, 1)] == [False, True]


def test_terms_along_separate_axes_are_separate_blocks() -> None:
    rows, columns = ids(0, 1, axis=0, ndim=2), ids(2, 3, 4, axis=1, ndim=2)
    scalar, both = ids(9, axis=0, ndim=2), torch.arange(10, 16).reshape(2, 3)

    def split(*arrays: Tensor) -> list[int]:
        return sorted(len(b) for b in term_blocks([LabelTerm(1, a) for a in arrays]))

    assert split(rows, columns) == [1, 1]
    assert split(rows, columns, both) == [3]
    assert split(scalar, rows, columns) == [1, 2]
    assert split(scalar) == [1]


def free_dimension(system: System) -> int:
    """Independent solutions, the variable that is always zero left out."""
    solution = solve(system)
    root = solution.root[solution.root >= 0].unique()
    return int((~torch.isin(root, torch.tensor([*solution.sums, -2]))).sum())


def test_a_sum_over_separate_axes_is_zero_where_both_are_constant() -> None:
    system = System()
    rows, columns = system.fresh(40, 1), system.fresh(1, 50)
    system.zero([LabelTerm(1, rows), LabelTerm(1, columns)])
    assert sum(e.ids.shape[1] for e in system.equations) < 100  # not 2000 rows
    root, sign = (t.tolist() for t in (solve(system).root, solve(system).sign))
    assert len({root[i] for i in rows.flatten()} | {root[i] for i in columns.flatten()}) == 1
    assert {sign[i] for i in rows.flatten()} == {-sign[int(columns[0, 0])]}


def test_pinning_leaves_nothing() -> None:
    system = System()
    label = Label((3,), (LabelTerm(1, system.fresh(3)),))
    assert free_dimension(system) == 3
    system.pin(label)
    assert free_dimension(system) == 0


def test_equality_of_labels_that_broadcast() -> None:
    system = System()
    wide = Label((2, 3), (LabelTerm(1, system.fresh(1, 3)),))
    narrow = Label((1,), (LabelTerm(1, system.fresh(1)),))
    system.equal(wide, narrow)
    assert free_dimension(system) == 1


def test_zeros_equal_everything() -> None:
    system = System()
    label = Label((3,), (LabelTerm(1, system.fresh(3)),))
    system.equal(label, Label((3,), wild=True))
    assert free_dimension(system) == 3


def test_uniform_along_an_axis_keeps_the_others() -> None:
    system = System()
    label = Label((2, 3), (LabelTerm(1, system.fresh(2, 3)), LabelTerm(1, system.fresh(2, 1))))
    flat = system.uniform(label, [1])
    assert not flat.varies(1)
    assert flat.varies(0)
    assert free_dimension(system) == 2 + 2
    assert system.uniform(flat, [1]) is flat


def test_two_terms_that_vary_may_cancel_in_a_uniform_label() -> None:
    system = System()
    a, b = system.fresh(1, 3), system.fresh(1, 3)
    system.uniform(Label((2, 3), (LabelTerm(1, a), LabelTerm(-1, b))), [1])
    assert free_dimension(system) == 3 + 1


@pytest.mark.parametrize("seed", range(5))
def test_distinct_drops_repeated_slices_and_nothing_else(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 5, (90,), generator=random)
    columns = torch.randint(0, 4, (70,), generator=random)
    whole = (rows.unsqueeze(1) * 10 + columns).reshape(90, 70)
    side = rows.unsqueeze(1) + 100
    before = {tuple(p) for p in zip(*(t.expand(90, 70).flatten().tolist() for t in (whole, side)),
                                    strict=True)}  # fmt: skip
    small = torch.broadcast_tensors(*distinct([whole, side]))
    after = list(zip(*(t.flatten().tolist() for t in small), strict=True))
    assert set(after) == before
    assert len(after) == len(before)


@pytest.mark.parametrize("hashes", ["all collide", "some collide"])
def test_slices_whose_hashes_collide_are_not_taken_for_equal(
    hashes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collision of two slices must lose no equation: their rows would stay free, unsoundly."""

    def colliding(ids: list[Tensor], axis: int) -> Tensor:
        size = ids[0].shape[axis]
        return torch.zeros(size, dtype=torch.int64) if hashes == "all collide" else (
            torch.arange(size) // 2
        )  # fmt: skip

    def free() -> int:
        system = System()
        a, b = system.fresh(60, 1), system.fresh(1, 70)
        system.equal(Label((60, 70), (LabelTerm(1, a + 0 * b),)), Label((60, 70)))
        system.pin(Label((60, 70), (LabelTerm(1, b + 0 * a),)))
        return free_dimension(system)

    assert free() == 0
    monkeypatch.setattr("enorm_fx.symmetry.labels._slice_hashes", colliding)
    assert free() == 0
