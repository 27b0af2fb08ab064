"""A view of a parameter is found again, and looks at the same part of anything of its shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from enorm_fx.calibration.views import Views

VIEWS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "itself": ((4, 6), lambda w: w),
    "detached": ((4, 6), lambda w: w.detach()),
    "transposed": ((4, 6), lambda w: w.t()),
    "rows": ((9, 4), lambda w: w.chunk(3)[1]),
    "columns": ((4, 6), lambda w: w[:, 2:5]),
    "rows and columns, transposed": ((8, 6), lambda w: w[3:5, 1:4].mT),
    "one row": ((4, 6), lambda w: w[2]),
    "one of several": ((3, 4, 6), lambda w: w[1].t()),
    "one of several, by a tensor": ((3, 4, 6), lambda w: w[torch.tensor(2)]),
    "a longer shape": ((4, 6), lambda w: w[None, :, None]),
    "repeated": ((4, 6), lambda w: w.expand(5, 4, 6)),
    "a kernel": ((4, 6, 3, 3), lambda w: w[1:3]),
    "axes moved": ((4, 6, 3), lambda w: w.permute(2, 0, 1)),
    "an axis of one": ((4, 1, 3), lambda w: w[:, 0]),
    "a single entry": ((1, 1), lambda w: w.t()),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_looks_at_the_same_part(name: str) -> None:
    shape, look = VIEWS[name]
    weight = nn.Parameter(torch.randn(shape))
    numbers = torch.arange(weight.numel()).reshape(shape)
    with torch.no_grad():
        seen = look(weight)
        view = Views({"w": weight}).find(seen)
        assert view is not None
        assert view.name == "w"
        assert torch.equal(view.of(numbers).expand(seen.shape), look(numbers))
        for axis in range(weight.dim()):  # what does not vary along some axes
            part = numbers.amax(axis, keepdim=True)
            expected = look(part.expand(shape))
            assert torch.equal(view.of(part).expand(seen.shape), expected)


def test_channels_last_memory() -> None:
    weight = nn.Parameter(torch.randn(4, 6, 3, 3).contiguous(memory_format=torch.channels_last))
    numbers = torch.arange(weight.numel()).reshape(weight.shape)
    view = Views({"w": weight}).find(weight[1:3].detach())
    assert view is not None
    assert torch.equal(view.of(numbers), numbers[1:3])


@pytest.mark.parametrize(
    "look",
    [
        lambda w: w[::2],
        lambda w: w.clone(),
        lambda w: w.view(torch.int32),
        lambda w: w.reshape(6, 4),
        lambda w: w.flatten(),
        lambda w: w.as_strided((3, 4), (6, 1), 5),  # runs over the ends of rows
        lambda w: torch.randn(4, 6),
    ],
)
def test_what_is_no_such_view_is_not_found(look: Callable[[Tensor], Tensor]) -> None:
    weight = nn.Parameter(torch.randn(4, 6))
    with torch.no_grad():
        assert Views({"w": weight}).find(look(weight)) is None
