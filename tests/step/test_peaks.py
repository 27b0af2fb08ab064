"""Maxima of the few cells that matter are those of all, to the last bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from enorm_fx.balancing import balance
from enorm_fx.step import descent, peaks
from enorm_fx.step.layout import Entry
from enorm_fx.step.peaks import Peaks
from enorm_fx.step.streamed import StreamedCells, streamed
from tests.support.helpers import KINDS, make

ROWS, COLUMNS = 60, 90


def _drawn(kind: str, seed: int = 0) -> Tensor:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    if kind == "zeros in it":
        weight[3], weight[:, 5] = 0, 0
    if kind == "all alike":
        weight = weight.sign()
    return weight.double()


def _streamed(weight: Tensor) -> StreamedCells:
    entry = Entry("weight", tuple(weight.shape), tuple(weight.shape), (1, 1), True, 1, ())
    return streamed(weight, entry, math.inf, torch.float64)


def _largest(cells: Tensor, axis: int, weights: Tensor) -> Tensor:
    return ((cells if axis == 0 else cells.t()) * weights).amax(1)


def _walk(steps: int, size: int, first: float) -> list[Tensor]:
    """Log factors that move less and less, with a jump on the way."""
    generator = torch.Generator().manual_seed(1)
    logs, found = torch.zeros(size).double(), []
    for step in range(steps):
        length = first * 0.7**step if step != steps // 2 else 1.0
        logs = logs + length * torch.randn(size, generator=generator).double()
        found.append(logs)
    return found


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["random", "zeros in it", "all alike"])
def test_they_are_those_of_all_cells(
    kind: str, axis: int, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peaks, "_MOST_STREAMED", peaks._MOST)
    monkeypatch.setattr("enorm_fx.step.streamed._CHUNK", 7 * COLUMNS)
    cells = _drawn(kind).abs()
    found = Peaks(cells if in_memory else _streamed(cells))
    looked = []
    of_all = found._of_all
    monkeypatch.setattr(found, "_of_all", lambda *given: looked.append(1) or of_all(*given))
    walk = _walk(40, (COLUMNS, ROWS)[axis], 0.5)
    for logs in walk:
        weights = (logs - logs.max()).exp()
        assert torch.equal(found.marginal(axis, logs, weights), _largest(cells, axis, weights))
    assert 4 < len(looked) < 20


def test_where_no_cell_can_be_left_out_all_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    cells, looked = torch.ones(ROWS, COLUMNS).double(), []
    found = Peaks(cells)
    of_all = found._of_all
    monkeypatch.setattr(found, "_of_all", lambda *given: looked.append(1) or of_all(*given))
    for step in range(20):
        logs = 1e-4 * torch.arange(COLUMNS).double().roll(step)
        assert torch.equal(found.marginal(0, logs, logs.exp()), _largest(cells, 0, logs.exp()))
    assert len(looked) == 20


def test_a_list_that_is_kept_for_too_long_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks._Listed, "hold_for", lambda self, logs: True)
    cells, wrong = _drawn("random").abs(), 0
    found = Peaks(cells)
    for logs in _walk(40, COLUMNS, 0.01):
        weights = (logs - logs.max()).exp()
        wrong += not torch.equal(found.marginal(0, logs, weights), _largest(cells, 0, weights))
    assert wrong


@pytest.mark.parametrize("kind", KINDS)
def test_a_balanced_model_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    balanced = []
    for fewest in (1, 1 << 40):
        monkeypatch.setattr(descent, "FEWEST", fewest)
        case = make(kind, seed=5)
        report = balance(case.plan, p=math.inf)
        balanced.append(([p.detach() for p in case.model.parameters()], report))
    (one, report), (two, other) = balanced
    assert report == other
    assert all(map(torch.equal, one, two))
