"""Small models that write into tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.zoo_kit import L, small

ROWS = (6, 3)


@small("slices written into zeros", ROWS, a=L(3, 4), b=L(3, 4), c=L(8, 2))
def _(m: Any, x: Tensor) -> Any:
    z = x.new_zeros(len(x), 8)
    z[:, :4] = m.a(x)
    z[:, 4:] = m.b(x)
    return m.c(z.relu())


@small("sum in place onto zeros", ROWS, a=L(3, 4), b=L(3, 4), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    z = torch.zeros(len(x), 4, dtype=x.dtype)
    z += m.a(x)
    z += m.b(x)
    return m.c(z.relu())


@small("multiplied in place", ROWS, a=L(3, 4), b=L(3, 4), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    y.mul_(m.b(x).sigmoid())
    y *= m.b(x).relu()
    return m.c(y)


@small("multiplied in place, read before and after", ROWS, a=L(3, 4), b=L(3, 4), c=L(8, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    before = y.relu()
    y.mul_(m.b(x))
    return m.c(torch.cat([before, y], 1))


@small("experts that choose their tokens", ROWS, router=L(3, 2), a=L(3, 4), b=L(4, 5),
       c=L(3, 4), d=L(4, 5), last=L(5, 2))  # fmt: skip
def _(m: Any, x: Tensor) -> Any:
    weight, chosen = m.router(x).softmax(1).topk(3, dim=0)
    z = x.new_zeros(len(x), 5)
    for e, (up, down) in enumerate(((m.a, m.b), (m.c, m.d))):
        index = chosen[:, e]
        z.index_add_(0, index, down(up(x[index]).relu()) * weight[:, e, None])
    return m.last(z)


@small("experts added up by scatter", ROWS, a=L(3, 4), b=L(4, 5), last=L(5, 2))
def _(m: Any, x: Tensor) -> Any:
    index = x[:, 0].topk(3).indices[:, None].expand(3, 5)
    y = m.b(m.a(x[:3]).relu())
    return m.last(torch.zeros(len(x), 5, dtype=x.dtype).scatter_add(0, index, y))


@small("written in turns", ROWS, a=L(3, 4), b=L(3, 4), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    z = x.new_zeros(len(x), 2, 4)
    z[:, 0] = m.a(x)
    z[:, 1].copy_(m.b(x))
    return m.c(z.relu()).sum(1)


@small("written into zeros where a table says", ROWS, a=L(3, 4), b=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu()
    z = torch.zeros_like(y)
    z[:, [1, 3]] = y[:, [0, 1]]
    return m.b(z)
