"""Small models in which not all of a parameter reaches an output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.zoo_kit import C, L, parameter, small

IMAGE = (2, 2, 3, 3)
ROWS = (6, 3)
BEFORE = "before anything reads it, "


@small(BEFORE + "a slice", ROWS, a=L(3, 5), b=L(3, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).relu()[:, :3])


@small(BEFORE + "a slice after relu_", ROWS, a=L(3, 5), b=L(3, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).relu_()[:, :3])


@small(BEFORE + "an index", ROWS, a=L(3, 5), b=L(2, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).relu()[:, [0, 3]])


@small(BEFORE + "a part", ROWS, a=L(3, 5), b=L(3, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).relu().split([2, 3], 1)[1])


@small(BEFORE + "a part of another shape", ROWS, a=L(3, 6), b=L(2, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).relu().view(-1, 3, 2)[:, 0])


@small(BEFORE + "a slice, two layers up", ROWS, a=L(3, 4), b=L(4, 6), c=L(3, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.b(m.a(x).relu()).relu()[:, ::2])


@small(
    BEFORE + "a slice, through a depthwise convolution",
    IMAGE, a=C(2, 6, 1), b=C(6, 6, 3, groups=6, padding=1), c=C(3, 2, 1),
)  # fmt: skip
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.b(m.a(x).relu()).relu()[:, ::2])


@small(
    BEFORE + "a slice, through groups", IMAGE, a=C(2, 6, 1, groups=2), b=C(6, 4, 1, groups=2),
    c=C(2, 2, 1),
)  # fmt: skip
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.b(m.a(x).relu()).relu()[:, :2])


@small(
    BEFORE + "a slice, through a transposed convolution", IMAGE, a=C(2, 4, 1),
    b=nn.ConvTranspose2d(4, 4, 1, groups=2), c=C(2, 2, 1),
)  # fmt: skip
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.b(m.a(x).relu()).relu()[:, :2])


@small(BEFORE + "a slice of normalized channels", ROWS, a=L(3, 4), n=nn.LayerNorm(4), b=L(2, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.n(m.a(x))[:, :2])


@small(BEFORE + "a slice of pooled channels", IMAGE, a=C(2, 4, 1), p=nn.PReLU(4), b=C(3, 2, 1))
def _(m: Any, x: Tensor) -> Any:
    return m.b(F.max_pool2d(m.p(m.a(x)), 2)[:, 1:])


@small(BEFORE + "a slice of sums", (6, 2, 3), a=L(3, 5), b=L(3, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).relu().cumsum(1).sum(1)[:, :3])


@small(BEFORE + "a slice of positions", (6, 3, 3), a=L(3, 4), p=parameter(1, 8, 4), b=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b((m.a(x) + m.p[:, :3]).relu())


@small(BEFORE + "a slice of products", ROWS, w=parameter(3, 5), v=parameter(3, 2))
def _(m: Any, x: Tensor) -> Any:
    return (x @ m.w).relu()[:, :3] @ m.v


@small(BEFORE + "a slice of values", (2, 4, 3), q=L(3, 4), k=L(3, 4), v=L(3, 4), o=L(2, 3))
def _(m: Any, x: Tensor) -> Any:
    return m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))[..., :2])


@small(BEFORE + "a slice of the outputs", ROWS, a=L(3, 5), b=L(5, 3))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).relu())[:, :1]


@small("a branch that nothing reads", ROWS, a=L(3, 4), b=L(4, 3), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu()
    unread = m.b(y).clone()
    unread[:, 0] = 1
    return m.c(y)


@small("written in part, read through another view", ROWS, a=L(3, 4), b=L(3, 2), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu().clone()
    part = y[:, :2]
    part += m.b(x).relu()
    return m.c(y)


@small("written into, read through a view of before", ROWS, a=L(3, 4), b=L(3, 4), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu().clone()
    view = y.t()
    y += m.b(x).relu()
    return m.c(view.t())


# --- zeros ---------------------------------------------------------------------------------------


@small("padded with zeros that nothing joins", ROWS, a=L(3, 4), b=L(6, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(F.pad(m.a(x).relu(), (0, 2)))


@small("padded with channels of zeros that nothing joins", IMAGE, a=C(2, 3, 1), b=C(6, 2, 1))
def _(m: Any, x: Tensor) -> Any:
    return m.b(F.pad(m.a(x).relu(), (0, 0, 0, 0, 1, 2)))


@small("padded with zeros, normalized", IMAGE, a=C(2, 3, 1), n=nn.BatchNorm2d(5), b=C(5, 2, 1))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.n(F.pad(m.a(x), (0, 0, 0, 0, 1, 1))).relu())


@small("padded with zeros that another branch joins", ROWS, a=L(3, 4), b=L(6, 2), c=L(3, 6))
def _(m: Any, x: Tensor) -> Any:
    return m.b(F.pad(m.a(x).relu(), (0, 2)) + m.c(x).relu())


@small("padded with zeros, added up over an axis", ROWS, a=L(3, 4), b=L(6, 2))
def _(m: Any, x: Tensor) -> Any:
    wide = F.pad(m.a(x).relu(), (0, 2))
    return m.b(torch.stack([wide, 2 * wide]).sum(0))


@small("padded with zeros, averaged over an axis", IMAGE, a=C(2, 3, 1), b=L(5, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(F.pad(m.a(x).relu(), (0, 0, 0, 0, 1, 1)).mean(3).amax(2))


@small("zeros side by side", ROWS, a=L(3, 4), b=L(6, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(torch.cat([m.a(x).relu(), x.new_zeros(len(x), 2)], 1))


@small("zeros side by side, moved and multiplied", ROWS, a=L(3, 4), b=L(6, 2), c=L(3, 6))
def _(m: Any, x: Tensor) -> Any:
    wide = torch.cat([m.a(x).relu(), x.new_zeros(len(x), 2)], 1).view(-1, 3, 2).transpose(1, 2)
    return m.b(wide.flatten(1) * m.c(x).relu())


@small("zeros into groups", IMAGE, a=C(2, 2, 1), b=C(4, 4, 1, groups=2), c=C(4, 2, 1))
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.b(F.pad(m.a(x).relu(), (0, 0, 0, 0, 0, 2))).relu())


@small("zeros through a transposed convolution", IMAGE, a=C(2, 2, 1),
       b=nn.ConvTranspose2d(4, 4, 1), c=C(4, 2, 1))  # fmt: skip
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.b(F.pad(m.a(x).relu(), (0, 0, 0, 0, 0, 2))).relu())


SHIFTED = "shifted into zeros, "


@small(SHIFTED + "by one channel", ROWS, a=L(3, 4), b=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu()
    z = torch.zeros_like(y)
    z[:, 1:] = y[:, :-1]
    return m.b(z)


@small(SHIFTED + "by steps and single places", ROWS, a=L(3, 6), b=L(6, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu()
    z = torch.zeros_like(y)
    z[..., 0::2] = y[:, 1::2]
    z[:, -1] = y[:, 0]
    return m.b(z.relu())


@small(SHIFTED + "in time, a part of the channels", ROWS, a=L(3, 6), b=L(6, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu()
    z = torch.zeros_like(y)
    z[:-1, :2] = y[1:, :2]
    z[1:, 2:4] = y[:-1, 2:4]
    return m.b(z)


@small(SHIFTED + "one image up", IMAGE, a=C(2, 3, 1), b=C(3, 2, 1))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu()
    z = y.new_zeros(y.shape)
    z[:, :2, 1:] = y[:, 1:, :-1]
    return m.b(z)


@small(SHIFTED + "through a view", ROWS, a=L(3, 4), b=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu()
    z = torch.zeros_like(y)
    z[:, 2:].copy_(y[:, :2])
    z[:, :1] = y[:, 2:3]
    return m.b(z)


@small(SHIFTED + "and filled up by a sum", ROWS, a=L(3, 4), b=L(4, 2), c=L(3, 4))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu()
    z = torch.zeros_like(y)
    z[:, 1:] = y[:, :-1]
    z += m.c(x).relu()
    return m.b(z)
