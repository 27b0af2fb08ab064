"""Rounding a weight to a few levels, against a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from enorm_fx.calibration.quantize import rounded


def by_hand(run: list[float], bits: int) -> list[float]:
    """The nearest of 2^bits levels for each entry of one run."""
    low, high = min(*run, 0.0), max(*run, 0.0)
    step = (high - low) / (2**bits - 1)
    if step == 0:
        return run
    zero = round(-low / step)
    levels = [(k - zero) * step for k in range(2**bits)]
    return [min(levels, key=lambda level: abs(level - x)) for x in run]


def expected(weight: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Rows are outputs."""
    rows = []
    for row in weight.flatten(1).tolist():
        size = group_size or len(row)
        runs = [row[k : k + size] for k in range(0, len(row), size)]
        rows.append([x for run in runs for x in by_hand(run, bits)])
    return torch.tensor(rows, dtype=weight.dtype).view(weight.shape)


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("group_size", [None, 4, 5, 100])
def test_every_entry_goes_to_the_nearest_level(bits: int, group_size: int | None) -> None:
    w = weight(3, 11)
    w[1] = w[1].abs()
    w[2] = 0
    assert torch.allclose(rounded(w, (0,), bits, group_size), expected(w, bits, group_size))


def test_outputs_may_be_any_axes() -> None:
    w = weight(4, 3, 2)
    assert torch.equal(
        rounded(w.permute(1, 0, 2), (1,), 3, None).permute(1, 0, 2), rounded(w, (0,), 3, None)
    )
    pairs = rounded(w.movedim(1, 2), (0, 2), 3, None).movedim(2, 1)
    assert torch.equal(pairs, rounded(w.flatten(0, 1), (0,), 3, None).view(w.shape))


def test_a_first_axis_may_be_split() -> None:
    w = weight(6, 2, 3)  # a transposed convolution of 6 inputs in 3 groups
    found = rounded(w, (0, 2), 3, None, split=3)
    for group in range(3):
        part = slice(2 * group, 2 * group + 2)
        assert torch.equal(found[part], rounded(w[part], (1,), 3, None))


def test_a_row_may_be_scaled_before_or_after() -> None:
    w, factors = weight(5, 8), torch.tensor([[2.0**k] for k in range(-2, 3)]).double()
    assert torch.equal(rounded(w * factors, (0,), 4, 3), rounded(w, (0,), 4, 3) * factors)


def test_zero_stays() -> None:
    w = weight(2, 9) + 3
    w[:, 4] = 0
    assert not bool(rounded(w, (0,), 2, None)[:, 4].any())
