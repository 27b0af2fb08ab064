"""Cells that are computed when needed are those in memory, and a descent on them the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from enorm_fx.analysis import analyze
from enorm_fx.errors import NonFiniteError
from enorm_fx.step import factors, measure, streamed
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.converge import converge_
from enorm_fx.step.layout import Entry
from enorm_fx.step.measure import objective
from enorm_fx.step.streamed import StreamedCells
from tests.support.helpers import KINDS, largest_error, make, same_bits, weights
from tests.support.plans import chain


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_CHUNK", 7)
    monkeypatch.setattr(measure, "_CHUNK", 7)
    monkeypatch.setattr(factors, "_CHUNK", 5)


def _careful(kind: str, p: float, room: int | None) -> CarefulStep:
    plan = make(kind, seed=3).plan
    careful = CarefulStep(plan, plan.groups, p=p, c=1.1, wide=True, room=room)
    careful.bind_()
    return careful


@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_descent_needs_no_cells_in_memory(kind: str, p: float) -> None:
    found = []
    for room in (None, 0):
        with torch.no_grad():
            descent, sizes = _careful(kind, p, room).measure_()
            cycles, gap = converge_(descent, 1e-10)
        assert gap <= 1e-10
        found.append((descent.u, sizes, cycles))
    (u, sizes, _), (other, other_sizes, _) = found
    assert torch.allclose(u, other, rtol=0, atol=1e-9)
    assert torch.allclose(sizes, other_sizes, rtol=1e-12)


def test_only_what_finds_no_room_is_streamed() -> None:
    wide = nn.Sequential(
        nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 40), nn.ReLU(),
        nn.Linear(40, 3),
    )  # fmt: skip
    plan = analyze(wide, torch.zeros(2, 4))
    for room, count in ((None, 0), (10**6, 0), (8 * 800 + 8 * 100, 1), (0, 2)):
        careful = CarefulStep(plan, plan.groups, p=2.0, wide=True, room=room)
        careful.bind_()
        with torch.no_grad():
            values = careful.measure_()[0].values
        assert sum(isinstance(v, StreamedCells) for v in values) == count


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(6, 9), (3, 2, 5), (4, 6, 2)])
def test_sums_are_those_of_the_cells(shape: tuple[int, ...], power: float) -> None:
    """Also of weights with runs along an axis, and of parts of the rows and columns."""
    torch.manual_seed(1)
    weight = torch.randn(shape).bfloat16()
    last = shape[-1] // 3 if shape == (6, 9) else shape[-1]
    runs = (1,) * (len(shape) - 1) + (last,)
    cells_shape = tuple(n // r for n, r in zip(shape, runs, strict=True))
    axes = tuple(axis for axis, size in enumerate(cells_shape) if size > 1)
    entry = Entry("w", shape, cells_shape, runs, True, 1, ())
    cells = StreamedCells(weight, entry, (axes[0], axes[1]), 2.0, torch.float64, power)
    dense = weight.double().square().unflatten(-1, (-1, last)).sum(-1).pow(power)
    dense = dense.view(cells.shape)
    assert torch.allclose(cells.computed(), dense, rtol=1e-12)
    one, two = torch.rand(2, len(dense)).double(), torch.rand(3, dense.shape[1]).double()
    assert torch.allclose(cells.between(one, two), one @ dense @ two.t(), rtol=1e-12)
    for axis, matrix in ((0, dense), (1, dense.t())):
        factors_ = torch.rand(matrix.shape[1]).double()
        for positions in (slice(None), slice(1, 2), torch.tensor([1, 0])):
            found = cells.marginal(axis, positions, factors_, False)
            assert torch.allclose(found, (matrix @ factors_)[positions], rtol=1e-12)
            found = cells.marginal(axis, positions, factors_, True)
            assert torch.allclose(found, (matrix * factors_).amax(1)[positions], rtol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_found(bad: float) -> None:
    case = chain([4, 5, 6, 3])
    name = next(s.name for s in case.plan.parameters if len(s.shape) == 2 and len(s.terms) == 2)
    with torch.no_grad():
        case.model.get_parameter(name).view(-1)[-1] = bad
        careful = CarefulStep(case.plan, case.plan.groups, p=2.0, wide=True, room=0)
        careful.bind_()
        descent, sizes = careful.measure_()
        with pytest.raises(NonFiniteError, match="entries that are not finite"):
            careful.edits(descent.u, sizes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_edits_do_what_a_step_writes(kind: str, dtype: torch.dtype) -> None:
    case = make(kind, seed=5)
    case.model.to(dtype)
    careful = CarefulStep(case.plan, case.plan.groups, p=2.0, wide=True)
    careful.bind_()
    before = weights(case.model)
    with torch.no_grad():
        descent, sizes = careful.measure_()
        converge_(descent, 1e-10)
        edits = careful.edits(descent.u, sizes)
        assert same_bits(weights(case.model), before)
        for name, edit in edits.items():
            edit(before[name])
        careful.apply_(descent.u, sizes, careful.collect((), None, gradients=False))
    assert same_bits(weights(case.model), before)
    assert edits


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_half_precision_is_measured_in_pieces(p: float) -> None:
    case = chain([4, 5, 6, 3], seed=2)
    wide = objective(case.plan, p, 1.1)
    rounded = chain([4, 5, 6, 3], seed=2)
    rounded.model.to(torch.bfloat16)
    exact = chain([4, 5, 6, 3], seed=2)
    exact.model.load_state_dict(rounded.model.state_dict())
    assert objective(rounded.plan, p, 1.1) == pytest.approx(objective(exact.plan, p, 1.1), 1e-12)
    assert objective(rounded.plan, p, 1.1) == pytest.approx(wide, 0.05)
    assert largest_error(weights(exact.model), weights(rounded.model)) == 0
