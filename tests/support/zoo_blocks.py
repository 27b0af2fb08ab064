"""Small models: attention, and blocks of well-known architectures."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.zoo_kit import C, L, R, chain, parameter, small, whole

IMAGE = (4, 2, 5, 5)


@small("attention", (3, 4, 3), q=L(3, 2), k=L(3, 2), v=L(3, 2), o=L(2, 2))
def _(m: Any, x: Tensor) -> Tensor:
    q, k, v = (m.q(x), m.k(x), m.v(x))
    return m.o((q @ k.transpose(1, 2)).softmax(-1) @ v)


@small(
    "attention function",
    (3, 4, 3),
    q=L(3, 2, False),
    k=L(3, 2, False),
    v=L(3, 2, False),
    o=L(2, 2, False),
)
def _(m: Any, x: Tensor) -> Any:
    return m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)))


@small("attention with two heads", (3, 3, 2), qkv=L(2, 12), o=L(4, 2))
def _(m: Any, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q, k, v = (z.view(n, t, 2, 2).transpose(1, 2) for z in m.qkv(x).chunk(3, dim=-1))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 4)
    return m.o(y)


@small(
    "multi-head attention", (4, 3, 2), a=nn.MultiheadAttention(2, 1, batch_first=True), o=L(2, 1)
)
def _(m: Any, x: Tensor) -> Any:
    return m.o(m.a(x, x, x, need_weights=False)[0].relu())


@small("attention pooling", (4, 3, 3), a=L(3, 4), s=L(3, 1), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c((m.a(x) * m.s(x).softmax(1)).sum(1))


class Block(nn.Module):
    """A transformer block of four channels and two heads."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.second = (nn.LayerNorm(4), nn.LayerNorm(4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mlp = nn.Sequential(L(4, 3), activation, L(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.second(x))


class Vit(nn.Module):
    """A vision transformer: patches, a class token, learned positions, one block."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block = (C(2, 4, 2, 2), Block(nn.GELU()))
        self.token, self.positions = (parameter(1, 1, 4), parameter(1, 5, 4))
        self.norm, self.head = (nn.LayerNorm(4), L(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.block(x))[:, 0])


_LAYER = {"d_model": 4, "nhead": 2, "dim_feedforward": 3, "batch_first": True, "dropout": 0.0}
whole("transformer block with relu", (2, 3, 4), lambda: Block(nn.ReLU()))


whole("vision transformer", (4, 2, 4, 4), Vit)


whole("encoder layer", (2, 3, 4), lambda: nn.TransformerEncoderLayer(**_LAYER))


whole("decoder layer", (2, 3, 4), (2, 3, 4), lambda: nn.TransformerDecoderLayer(**_LAYER))

# --- blocks ------------------------------------------------------------


@small(
    "convnext block",
    (4, 2, 4, 4),
    stem=C(2, 2, 1),
    depth=C(2, 2, 3, 1, 1, groups=2),
    norm=nn.LayerNorm(2),
    wide=L(2, 3),
    narrow=L(3, 2),
    scale=parameter(2),
    head=L(2, 2),
)
def _(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    y = m.narrow(F.relu(m.wide(m.norm(m.depth(x).permute(0, 2, 3, 1))))) * m.scale
    return m.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


@small("pointnet", (4, 3, 5), a=nn.Conv1d(3, 4, 1), b=nn.Conv1d(4, 3, 1), c=L(3, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.b(m.a(x).relu()).max(dim=2)[0])


@small("feature pyramid", (4, 2, 4, 4), a=C(2, 3, 1), l=C(3, 2, 1), t=C(3, 2, 1), o=C(2, 1, 1))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu()
    return m.o((m.l(y) + F.interpolate(m.t(F.max_pool2d(y, 2)), scale_factor=2)).relu())


@small("mlp mixer", (4, 3, 3), a=L(3, 4), s=L(3, 3), t=L(3, 3), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.t(m.s(m.a(x).transpose(1, 2)).relu()).transpose(1, 2))


@small("maxout", (6, 3), a=L(3, 8), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.a(x).view(-1, 4, 2).max(-1)[0])


@small("experts", (8, 3), r=L(3, 2), a=L(3, 3), b=L(3, 2), c=L(3, 3), d=L(3, 2))
def _(m: Any, x: Tensor) -> Any:
    return (
        m.r(x).softmax(-1)[..., None] * torch.stack([m.b(m.a(x).relu()), m.d(m.c(x).relu())], 1)
    ).sum(1)


@small("two towers", (6, 3), (6, 2), a=L(3, 4), b=L(2, 4))
def _(m: Any, x: Tensor, y: Tensor) -> Any:
    return (m.a(x).relu() * m.b(y).relu()).sum(1)


@small("gram matrix", (8, 3, 3), a=L(3, 2), c=L(9, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu()
    return m.c((y @ y.transpose(1, 2)).flatten(1))


@small("outer product", (8, 3), a=L(3, 2), b=L(3, 2), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c(torch.einsum("ni,nj->nij", m.a(x), m.b(x)).flatten(1))


@small("highway", (6, 3), a=L(3, 4), b=L(4, 4), g=L(3, 4), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    h = m.a(x).relu()
    g = m.g(x).sigmoid()
    return m.c(g * m.b(h).relu() + (1 - g) * h)


@small("both signs", IMAGE, a=C(2, 2, 1), c=C(4, 1, 1))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.c(torch.cat([y, -y], 1).relu())


@small(
    "standardized convolution",
    IMAGE,
    w=parameter(3, 2, 2, 2),
    g=parameter(3, 1, 1, 1),
    b=C(3, 2, 1),
)
def _(m: Any, x: Tensor) -> Any:
    return m.b(
        F.conv2d(
            x, (m.w - m.w.mean((1, 2, 3), True)) / m.w.std((1, 2, 3), keepdim=True) * m.g
        ).relu()
    )


@small("choice", (6, 3), a=L(3, 4), b=L(3, 4), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c(torch.where(m.a(x) > 0, m.a(x), m.b(x)))


@small("running sum", (4, 3, 3), a=L(3, 4), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.a(x).cumsum(1))


chain(
    "reflected borders",
    IMAGE,
    C(2, 3, 3, padding=1, padding_mode="reflect"),
    R(),
    C(3, 2, 3, padding=1, padding_mode="circular"),
)


@small("y over its norm", (6, 3), a=L(3, 4), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.c(y / y.norm(dim=1, keepdim=True))
