"""Sums that are added up before they travel are the sums of what would have travelled."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from enorm_fx.step.joint_sums import Sums, joined

CHANNELS = 5


def sums(seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 3.0) -> list[Sums]:
    """Of two coefficients and two ways to reduce; all channels, some, some more than once."""
    generator = torch.Generator().manual_seed(seed)

    def one(coefficient: float, channels: slice | Tensor, *groups: str) -> Sums:
        size = len(torch.arange(CHANNELS)[channels])
        values = torch.rand(size, generator=generator, dtype=torch.float64).to(dtype)
        offset = spread * torch.randn(size, generator=generator, dtype=torch.float64)
        return Sums(coefficient, values, offset, channels, groups)

    everything, some = slice(0, CHANNELS), torch.tensor([3, 0, 3])
    return [
        one(1.0, everything, "a"), one(1.0, some, "a"), one(-1.0, everything, "a"),
        one(1.0, slice(1, 4), "a"), one(-1.0, everything, "b"), one(1.0, everything),
        one(1.0, everything), one(-1.0, slice(2, 5), "b"), one(-1.0, everything, "b"),
    ]  # fmt: skip


def totals(found: list[Sums], largest: bool) -> dict[tuple[float, object], Tensor]:
    """By coefficient and way to reduce, the sum (or maximum) for each channel."""
    result: dict[tuple[float, object], Tensor] = {}
    for one in found:
        total = result.setdefault(
            (one.coefficient, one.groups), torch.zeros(CHANNELS, dtype=torch.float64)
        )
        for place, channel in enumerate(torch.arange(CHANNELS)[one.channels].tolist()):
            value = one.logs()[place].exp()
            total[channel] = max(total[channel], value) if largest else total[channel] + value
    return result


@pytest.mark.parametrize("largest", [False, True])
def test_the_sums_stay_and_fewer_numbers_travel(largest: bool) -> None:
    before = sums()
    after = joined(before, CHANNELS, largest)
    expected, found = totals(before, largest), totals(after, largest)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-13, atol=0)
        assert not torch.allclose(found[key], value * 1.01, rtol=1e-13, atol=0)
    travelling = [one for one in after if one.groups]
    assert len(travelling) == 3
    assert sum(len(one.values) for one in travelling) == 3 * CHANNELS
    assert [one for one in after if not one.groups] == [one for one in before if not one.groups]


def test_what_would_not_become_less_travels_as_it_is() -> None:
    few = [one for one in sums() if len(one.values) == 3]
    assert joined(few[:1], CHANNELS, False) == few[:1]
    short, other = (one for one in few if one.groups == ("a",))
    assert len(joined([short], CHANNELS, False)) == 1
    assert len(joined([short, other], 6, False)) == 2
    assert len(joined([short, other], CHANNELS, False)) == 1


def test_sums_of_processes_may_be_reduced_after_they_were_joined() -> None:
    """Offsets are the same in all processes, so values may be added."""
    one, other = sums(), sums(seed=1)
    other = [
        Sums(b.coefficient, b.values, a.offset, b.channels, b.groups)
        for a, b in zip(one, other, strict=True)
    ]
    both = [
        Sums(a.coefficient, a.values + b.values, a.offset, a.channels, a.groups)
        for a, b in zip(one, other, strict=True)
    ]
    expected = joined(both, CHANNELS, False)
    first, second = joined(one, CHANNELS, False), joined(other, CHANNELS, False)
    for whole, a, b in zip(expected, first, second, strict=True):
        assert torch.equal(a.offset, b.offset)
        assert torch.allclose(a.values + b.values, whole.values, rtol=1e-13, atol=0)


def test_nothing_overflows_and_what_is_lost_is_nothing_beside_the_rest() -> None:
    found = joined(sums(dtype=torch.float32, spread=300.0), CHANNELS, False)
    expected = totals(sums(dtype=torch.float32, spread=300.0), False)
    for one in found:
        assert one.values.isfinite().all()
        assert one.values.dtype == torch.float32
    for key, value in totals(found, False).items():
        fine = torch.isfinite(value) & (value > 0) & torch.isfinite(expected[key])
        assert fine.any()
        assert torch.allclose(value[fine], expected[key][fine], rtol=1e-5, atol=0)


def test_a_channel_that_nothing_touches_has_nothing() -> None:
    part = [one for one in sums() if one.groups == ("a",) and len(one.values) == 3]
    (total,) = joined([part[1], part[1]], CHANNELS, False)
    assert total.logs()[0] == total.logs()[4] == -math.inf
    assert total.logs()[1:4].isfinite().all()
