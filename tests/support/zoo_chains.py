"""Small models: chains, grouped convolutions, branches that meet."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.zoo_kit import C, L, R, chain, small

IMAGE = (4, 2, 5, 5)

# --- chains ------------------------------------------------------------

chain("mlp", (6, 3), L(3, 4), R(), L(4, 3), R(), L(3, 2))
chain("mlp without bias", (6, 3), L(3, 4, False), R(), L(4, 3, False), R(), L(3, 2, False))
chain("one layer", (6, 3), L(3, 2))
chain("linear chain", (6, 3), L(3, 3), L(3, 2))
chain("tanh", (6, 3), L(3, 4), nn.Tanh(), L(4, 2))
chain("leaky", (6, 3), L(3, 4), nn.LeakyReLU(0.2), L(4, 2))
chain("prelu", (6, 3), L(3, 4), nn.PReLU(), L(4, 3), nn.PReLU(3), L(3, 2))
chain("conv chain", IMAGE, C(2, 3, 2), R(), C(3, 2, 2), R(), C(2, 1, 2))
chain(
    "conv, pool, flatten, linear",
    IMAGE,
    C(2, 3, 2),
    R(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    L(12, 3),
    R(),
    L(3, 2),
)
chain(
    "conv, mean pool, linear",
    IMAGE,
    C(2, 3, 2),
    R(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    L(3, 2),
)
chain("conv1d", (4, 2, 8), nn.Conv1d(2, 3, 2), R(), nn.AvgPool1d(2), nn.Conv1d(3, 2, 2))
chain("conv3d", (3, 1, 3, 3, 3), nn.Conv3d(1, 2, 2), R(), nn.Conv3d(2, 1, 1))
chain("conv over the width axis", IMAGE, C(2, 2, 2), R(), L(4, 3))
chain("flatten(2) and linear over positions", IMAGE, C(2, 2, 2), R(), nn.Flatten(2), L(16, 2))
chain("batch norm", IMAGE, C(2, 3, 2), nn.BatchNorm2d(3), R(), C(3, 2, 2))
chain(
    "batch norm without affine", IMAGE, C(2, 3, 2), nn.BatchNorm2d(3, affine=False), R(), C(3, 2, 2)
)
chain("layer norm", (6, 3), L(3, 4), nn.LayerNorm(4), L(4, 3), R(), L(3, 2))
chain("rms norm", (6, 3), L(3, 4), nn.RMSNorm(4, eps=0.1), L(4, 2))
chain("group norm", IMAGE, C(2, 4, 2), nn.GroupNorm(2, 4), R(), C(4, 1, 2))
chain("transposed conv", IMAGE, C(2, 3, 2), R(), nn.ConvTranspose2d(3, 2, 2), R(), C(2, 1, 1))
chain(
    "transposed grouped conv",
    IMAGE,
    C(2, 4, 2),
    R(),
    nn.ConvTranspose2d(4, 4, 2, groups=2),
    R(),
    C(4, 1, 1),
)
chain("upsample", IMAGE, C(2, 2, 2), R(), nn.Upsample(scale_factor=2), C(2, 1, 2))
chain("pixel shuffle", IMAGE, C(2, 4, 2), R(), nn.PixelShuffle(2), C(1, 2, 2))
chain("zero padding", IMAGE, C(2, 2, 2), R(), nn.ZeroPad2d(1), C(2, 1, 2))
chain("lp pooling", IMAGE, C(2, 2, 2), R(), nn.LPPool2d(2, 2), C(2, 1, 1))


@small("embedding", (6, 2), a=nn.Embedding(3, 4), b=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x.long() % 3).relu())


@small("relu6", (40, 3), a=L(3, 4), b=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(F.relu6(6 * m.a(x)))


# --- groups ------------------------------------------------------------

chain("grouped conv", IMAGE, C(2, 4, 2), R(), C(4, 4, 2, groups=2), R(), C(4, 1, 2))
chain("depthwise separable", IMAGE, C(2, 3, 1), R(), C(3, 3, 2, groups=3), R(), C(3, 2, 1))
chain("depthwise with multiplier", IMAGE, C(2, 2, 1), R(), C(2, 4, 2, groups=2), R(), C(4, 1, 1))
chain("grouped first layer", IMAGE, C(2, 4, 2, groups=2), R(), C(4, 1, 2))
chain("grouped last layer", IMAGE, C(2, 4, 2), R(), C(4, 2, 2, groups=2))


@small("channel shuffle", IMAGE, a=C(2, 4, 1), b=C(4, 4, 1, groups=2), c=C(4, 1, 1))
def _(m: Any, x: Tensor) -> Tensor:
    x = m.a(x).relu()
    n, c, h, w = x.size()
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return m.c(m.b(x).relu())


# --- branches ------------------------------------------------------------


@small("residual", (6, 3), a=L(3, 4), b=L(4, 3), c=L(3, 4), d=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    h = m.a(x).relu()
    return m.d(h + m.c(m.b(h).relu()))


@small("residual on the input", (6, 3), a=L(3, 4), b=L(4, 3), d=L(3, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.d(x + m.b(m.a(x).relu()))


@small("residual with projection", (6, 3), a=L(3, 4), b=L(4, 3), c=L(3, 3), d=L(3, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.d((m.c(x) + m.b(m.a(x).relu())).relu())


@small("residual difference", (6, 3), a=L(3, 4), b=L(4, 3), c=L(3, 3), d=L(3, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.d((m.c(x) - m.b(m.a(x).relu())).abs())


@small("dense block", (6, 3), a=L(3, 2), b=L(2, 3), c=L(5, 2), d=L(7, 2))
@small("dense block of convolutions", IMAGE, a=C(2, 2, 1), b=C(2, 2, 1), c=C(4, 2, 1), d=C(6, 1, 1))
def _(m: Any, x: Tensor) -> Tensor:
    a = m.a(x).relu()
    b = m.b(a).relu()
    c = m.c(torch.cat([a, b], 1)).relu()
    return m.d(torch.cat([a, b, c], 1))


@small("cat with the input", (6, 3), a=L(3, 4), b=L(7, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(torch.cat([x, m.a(x).relu()], 1))


@small("cat along positions", IMAGE, a=C(2, 2, 1), b=C(2, 2, 1), c=C(2, 1, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c(torch.cat([m.a(x).relu(), m.b(x).relu()], 2))


@small(
    "u-net",
    (4, 2, 4, 4),
    a=C(2, 2, 1),
    b=C(2, 3, 1),
    up=nn.ConvTranspose2d(3, 2, 2, 2),
    d=C(4, 1, 1),
)
def _(m: Any, x: Tensor) -> Tensor:
    a = m.a(x).relu()
    b = m.b(F.max_pool2d(a, 2)).relu()
    return m.d(torch.cat([a, m.up(b)], 1).relu())


@small("squeeze and excitation", IMAGE, a=C(2, 3, 1), b=C(3, 2, 1), c=C(2, 3, 1), d=C(3, 1, 1))
def _(m: Any, x: Tensor) -> Any:
    h = m.a(x).relu()
    return m.d(h * m.c(m.b(h.mean((2, 3), True)).relu()).sigmoid())


@small("two heads", (6, 3), a=L(3, 4), b=L(4, 1), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    h = m.a(x).relu()
    return (m.b(h), m.c(h))


@small("an output that is read on", (6, 3), a=L(3, 4), b=L(4, 1))
def _(m: Any, x: Tensor) -> Any:
    h = m.a(x).relu()
    return {"h": h, "y": m.b(h)}


@small("two inputs", (6, 3), (6, 2), a=L(3, 4), b=L(2, 4), c=L(4, 2))
def _(m: Any, x: Tensor, y: Tensor) -> Any:
    return m.c((m.a(x) + m.b(y)).relu())


@small("maximum of two", (6, 3), a=L(3, 4), b=L(3, 4), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c(torch.maximum(m.a(x), m.b(x)))


@small("maximum with zeros", (6, 3), a=L(3, 4), b=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(torch.maximum(m.a(x), torch.zeros_like(m.a(x))))


@small("chunks", (6, 3), a=L(3, 4), b=L(2, 2), c=L(2, 2))
def _(m: Any, x: Tensor) -> Any:
    p, q = m.a(x).chunk(2, 1)
    return m.b(p.relu()) + m.c(q.relu())


@small("chunks that are added", (6, 3), a=L(3, 4), b=L(2, 2))
def _(m: Any, x: Tensor) -> Any:
    p, q = m.a(x).chunk(2, 1)
    return m.b((p + q).relu())


@small("slices", (6, 3), a=L(3, 5), b=L(3, 2), c=L(3, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu()
    return m.b(y[:, :3]) + m.c(y[:, 2:])


@small("permuted by a constant", (6, 3), a=L(3, 4), b=L(4, 2), c=L(3, 4))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).relu()[:, [2, 0, 3, 1]] + m.c(x).relu())


@small("index buffer", (6, 3), a=L(3, 4), b=L(4, 2), order=torch.tensor([2, 0, 3, 1]))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).relu()[:, m.order])


@small("channels padded by zeros", (6, 3), a=L(3, 2), b=L(4, 2), c=L(3, 4))
def _(m: Any, x: Tensor) -> Any:
    return m.b((F.pad(m.a(x).relu(), (0, 2)) + m.c(x)).relu())


@small("broadcast sum of 4 and 1", (6, 3), a=L(3, 4), b=L(3, 1), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c((m.a(x) + m.b(x)).relu())
