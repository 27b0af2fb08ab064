"""Small models of every kind, each with one input, for exact counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Small:
    """A model that is built when it is needed, and inputs for it."""

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(5)
        return tuple(
            torch.randn(shape, dtype=torch.float64, generator=generator) for shape in self.shapes
        )


class Net(nn.Module):
    """Layers by name and a function of (self, *inputs) that uses them."""

    def __init__(self, run: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def seq(*layers: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def net(run: Callable[..., Any], **layers: Any) -> Callable[[], nn.Module]:
    return lambda: Net(run, **layers)


ZOO: list[Small] = []


def small(name: str, build: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> None:
    ZOO.append(Small(name, build, shapes))


L, R, C = nn.Linear, nn.ReLU, nn.Conv2d
IMAGE = (4, 2, 5, 5)

# --- chains ------------------------------------------------------------------------------------
small("mlp", seq(L(3, 4), R(), L(4, 3), R(), L(3, 2)), (6, 3))
small("mlp without bias", seq(L(3, 4, False), R(), L(4, 3, False), R(), L(3, 2, False)), (6, 3))
small("one layer", seq(L(3, 2)), (6, 3))
small("linear chain", seq(L(3, 3), L(3, 2)), (6, 3))
small("tanh", seq(L(3, 4), nn.Tanh(), L(4, 2)), (6, 3))
small("leaky", seq(L(3, 4), nn.LeakyReLU(0.2), L(4, 2)), (6, 3))
small("prelu", seq(L(3, 4), nn.PReLU(), L(4, 3), nn.PReLU(3), L(3, 2)), (6, 3))
small("conv chain", seq(C(2, 3, 2), R(), C(3, 2, 2), R(), C(2, 1, 2)), IMAGE)
small("conv, pool, flatten, linear",
      seq(C(2, 3, 2), R(), nn.MaxPool2d(2), nn.Flatten(), L(12, 3), R(), L(3, 2)), IMAGE)  # fmt: skip
small("conv, mean pool, linear",
      seq(C(2, 3, 2), R(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), L(3, 2)), IMAGE)  # fmt: skip
small("conv1d", seq(nn.Conv1d(2, 3, 2), R(), nn.AvgPool1d(2), nn.Conv1d(3, 2, 2)), (4, 2, 8))
small("conv3d", seq(nn.Conv3d(1, 2, 2), R(), nn.Conv3d(2, 1, 1)), (3, 1, 3, 3, 3))
small("conv over the width axis", seq(C(2, 2, 2), R(), L(4, 3)), IMAGE)
small("flatten(2) and linear over positions", seq(C(2, 2, 2), R(), nn.Flatten(2), L(16, 2)), IMAGE)
small("batch norm", seq(C(2, 3, 2), nn.BatchNorm2d(3), R(), C(3, 2, 2)), IMAGE)
small("batch norm without affine",
      seq(C(2, 3, 2), nn.BatchNorm2d(3, affine=False), R(), C(3, 2, 2)), IMAGE)  # fmt: skip
small("layer norm", seq(L(3, 4), nn.LayerNorm(4), L(4, 3), R(), L(3, 2)), (6, 3))
small("rms norm", seq(L(3, 4), nn.RMSNorm(4, eps=0.1), L(4, 2)), (6, 3))
small("group norm", seq(C(2, 4, 2), nn.GroupNorm(2, 4), R(), C(4, 1, 2)), IMAGE)
small("transposed conv", seq(C(2, 3, 2), R(), nn.ConvTranspose2d(3, 2, 2), R(), C(2, 1, 1)), IMAGE)
small("transposed grouped conv",
      seq(C(2, 4, 2), R(), nn.ConvTranspose2d(4, 4, 2, groups=2), R(), C(4, 1, 1)), IMAGE)  # fmt: skip
small("upsample", seq(C(2, 2, 2), R(), nn.Upsample(scale_factor=2), C(2, 1, 2)), IMAGE)
small("pixel shuffle", seq(C(2, 4, 2), R(), nn.PixelShuffle(2), C(1, 2, 2)), IMAGE)
small("zero padding", seq(C(2, 2, 2), R(), nn.ZeroPad2d(1), C(2, 1, 2)), IMAGE)
small("lp pooling", seq(C(2, 2, 2), R(), nn.LPPool2d(2, 2), C(2, 1, 1)), IMAGE)
small("embedding", net(lambda m, x: m.b(m.a(x.long() % 3).relu()), a=nn.Embedding(3, 4), b=L(4, 2)),
      (6, 2))  # fmt: skip
small("relu6", net(lambda m, x: m.b(F.relu6(6 * m.a(x))), a=L(3, 4), b=L(4, 2)), (40, 3))

# --- groups ------------------------------------------------------------------------------------
small("grouped conv", seq(C(2, 4, 2), R(), C(4, 4, 2, groups=2), R(), C(4, 1, 2)), IMAGE)
small("depthwise separable", seq(C(2, 3, 1), R(), C(3, 3, 2, groups=3), R(), C(3, 2, 1)), IMAGE)
small(
    "depthwise with multiplier", seq(C(2, 2, 1), R(), C(2, 4, 2, groups=2), R(), C(4, 1, 1)), IMAGE
)
small("grouped first layer", seq(C(2, 4, 2, groups=2), R(), C(4, 1, 2)), IMAGE)
small("grouped last layer", seq(C(2, 4, 2), R(), C(4, 2, 2, groups=2)), IMAGE)


def _shuffle(m: Any, x: Tensor) -> Tensor:
    x = m.a(x).relu()
    n, c, h, w = x.size()
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return m.c(m.b(x).relu())


small("channel shuffle", net(_shuffle, a=C(2, 4, 1), b=C(4, 4, 1, groups=2), c=C(4, 1, 1)), IMAGE)

# --- branches ----------------------------------------------------------------------------------
small("residual", net(lambda m, x: m.d((lambda h: h + m.c(m.b(h).relu()))(m.a(x).relu())),
      a=L(3, 4), b=L(4, 3), c=L(3, 4), d=L(4, 2)), (6, 3))  # fmt: skip
small("residual on the input", net(lambda m, x: m.d(x + m.b(m.a(x).relu())), a=L(3, 4), b=L(4, 3),
      d=L(3, 2)), (6, 3))  # fmt: skip
small("residual with projection", net(lambda m, x: m.d((m.c(x) + m.b(m.a(x).relu())).relu()),
      a=L(3, 4), b=L(4, 3), c=L(3, 3), d=L(3, 2)), (6, 3))  # fmt: skip
small("residual difference", net(lambda m, x: m.d((m.c(x) - m.b(m.a(x).relu())).abs()),
      a=L(3, 4), b=L(4, 3), c=L(3, 3), d=L(3, 2)), (6, 3))  # fmt: skip


def _dense(m: Any, x: Tensor) -> Tensor:
    a = m.a(x).relu()
    b = m.b(a).relu()
    c = m.c(torch.cat([a, b], 1)).relu()
    return m.d(torch.cat([a, b, c], 1))


small("dense block", net(_dense, a=L(3, 2), b=L(2, 3), c=L(5, 2), d=L(7, 2)), (6, 3))
small("dense block of convolutions",
      net(_dense, a=C(2, 2, 1), b=C(2, 2, 1), c=C(4, 2, 1), d=C(6, 1, 1)), IMAGE)  # fmt: skip
small("cat with the input", net(lambda m, x: m.b(torch.cat([x, m.a(x).relu()], 1)), a=L(3, 4),
      b=L(7, 2)), (6, 3))  # fmt: skip
small("cat along positions", net(lambda m, x: m.c(torch.cat([m.a(x).relu(), m.b(x).relu()], 2)),
      a=C(2, 2, 1), b=C(2, 2, 1), c=C(2, 1, 2)), IMAGE)  # fmt: skip


def _unet(m: Any, x: Tensor) -> Tensor:
    a = m.a(x).relu()
    b = m.b(F.max_pool2d(a, 2)).relu()
    return m.d(torch.cat([a, m.up(b)], 1).relu())


small("u-net", net(_unet, a=C(2, 2, 1), b=C(2, 3, 1), up=nn.ConvTranspose2d(3, 2, 2, 2),
      d=C(4, 1, 1)), (4, 2, 4, 4))  # fmt: skip
small("squeeze and excitation", net(lambda m, x: m.d((lambda h: h * m.c(m.b(h.mean((2, 3), True))
      .relu()).sigmoid())(m.a(x).relu())), a=C(2, 3, 1), b=C(3, 2, 1), c=C(2, 3, 1),
      d=C(3, 1, 1)), IMAGE)  # fmt: skip
small("two heads", net(lambda m, x: (lambda h: (m.b(h), m.c(h)))(m.a(x).relu()), a=L(3, 4),
      b=L(4, 1), c=L(4, 2)), (6, 3))  # fmt: skip
small("an output that is read on", net(lambda m, x: (lambda h: {"h": h, "y": m.b(h)})(m.a(x).relu()),
      a=L(3, 4), b=L(4, 1)), (6, 3))  # fmt: skip
small("two inputs", net(lambda m, x, y: m.c((m.a(x) + m.b(y)).relu()), a=L(3, 4), b=L(2, 4),
      c=L(4, 2)), (6, 3), (6, 2))  # fmt: skip
small("maximum of two", net(lambda m, x: m.c(torch.maximum(m.a(x), m.b(x))), a=L(3, 4), b=L(3, 4),
      c=L(4, 2)), (6, 3))  # fmt: skip
small("maximum with zeros", net(lambda m, x: m.b(torch.maximum(m.a(x), torch.zeros_like(m.a(x)))),
      a=L(3, 4), b=L(4, 2)), (6, 3))  # fmt: skip
small("chunks", net(lambda m, x: (lambda p, q: m.b(p.relu()) + m.c(q.relu()))(*m.a(x).chunk(2, 1)),
      a=L(3, 4), b=L(2, 2), c=L(2, 2)), (6, 3))  # fmt: skip
small("chunks that are added", net(lambda m, x: (lambda p, q: m.b((p + q).relu()))(
      *m.a(x).chunk(2, 1)), a=L(3, 4), b=L(2, 2)), (6, 3))  # fmt: skip
small("slices", net(lambda m, x: (lambda y: m.b(y[:, :3]) + m.c(y[:, 2:]))(m.a(x).relu()),
      a=L(3, 5), b=L(3, 2), c=L(3, 2)), (6, 3))  # fmt: skip
small("permuted by a constant", net(lambda m, x: m.b(m.a(x).relu()[:, [2, 0, 3, 1]] + m.c(x).relu()),
      a=L(3, 4), b=L(4, 2), c=L(3, 4)), (6, 3))  # fmt: skip
small("index buffer", net(lambda m, x: m.b(m.a(x).relu()[:, m.order]), a=L(3, 4), b=L(4, 2),
      order=torch.tensor([2, 0, 3, 1])), (6, 3))  # fmt: skip
small("channels padded by zeros", net(lambda m, x: m.b((F.pad(m.a(x).relu(), (0, 2)) + m.c(x))
      .relu()), a=L(3, 2), b=L(4, 2), c=L(3, 4)), (6, 3))  # fmt: skip
small("broadcast sum of 4 and 1", net(lambda m, x: m.c((m.a(x) + m.b(x)).relu()), a=L(3, 4),
      b=L(3, 1), c=L(4, 2)), (6, 3))  # fmt: skip

# --- products ----------------------------------------------------------------------------------
small("gated by relu", net(lambda m, x: m.c(m.a(x).relu() * m.b(x)), a=L(3, 4), b=L(3, 4),
      c=L(4, 2)), (6, 3))  # fmt: skip
small("gated by sigmoid", net(lambda m, x: m.c(m.a(x).sigmoid() * m.b(x)), a=L(3, 4), b=L(3, 4),
      c=L(4, 2)), (6, 3))  # fmt: skip
small("gated by silu", net(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)), a=L(3, 4), b=L(3, 4),
      c=L(4, 2)), (6, 3))  # fmt: skip
small("glu", seq(L(3, 4), nn.GLU(1), L(2, 2)), (6, 3))
small("gate in a residual stream", net(lambda m, x: m.d((lambda h: h + m.b(h).relu() * m.c(h))(m.a(x))),
      a=L(3, 4), b=L(4, 4), c=L(4, 4), d=L(4, 2)), (6, 3))  # fmt: skip
small("square", net(lambda m, x: m.b(m.a(x).relu() ** 2), a=L(3, 4), b=L(4, 2)), (6, 3))
small("y * y", net(lambda m, x: (lambda y: m.b(y * y))(m.a(x)), a=L(3, 4), b=L(4, 2)), (6, 3))
small("y * relu(y)", net(lambda m, x: (lambda y: m.b(y * y.relu()))(m.a(x)), a=L(3, 4), b=L(4, 2)),
      (6, 3))  # fmt: skip
small(
    "y + y * y", net(lambda m, x: (lambda y: m.b(y + y * y))(m.a(x)), a=L(3, 4), b=L(4, 2)), (6, 3)
)
small("division", net(lambda m, x: m.c(m.a(x).relu() / m.b(x).exp()), a=L(3, 4), b=L(3, 4),
      c=L(4, 2)), (6, 3))  # fmt: skip
small("division by abs", net(lambda m, x: m.c(m.a(x) / m.b(x).abs()), a=L(3, 4), b=L(3, 4),
      c=L(4, 2)), (6, 3))  # fmt: skip
small("division by the norm", net(lambda m, x: (lambda y: m.b(y / y.abs().sum(1, True)))(m.a(x)),
      a=L(3, 4), b=L(4, 2)), (6, 3))  # fmt: skip
small(
    "root of squares", net(lambda m, x: m.b(m.a(x).square().sqrt()), a=L(3, 4), b=L(4, 2)), (6, 3)
)
small("a constant is added", net(lambda m, x: m.b(m.a(x).relu() + 1), a=L(3, 4), b=L(4, 2)), (6, 3))
small("a scale of one's own", net(lambda m, x: m.b(m.a(x).relu() * m.g), a=L(3, 4), b=L(4, 2),
      g=parameter(4)), (6, 3))  # fmt: skip
small("layer scale", net(lambda m, x: m.d((lambda h: h + m.g * m.b(h).relu())(m.a(x))), a=L(3, 4),
      b=L(4, 4), d=L(4, 2), g=parameter(4)), (6, 3))  # fmt: skip
small("a channel scale of images", net(lambda m, x: m.b(m.a(x).relu() * m.g), a=C(2, 3, 1),
      b=C(3, 1, 1), g=parameter(1, 3, 1, 1)), IMAGE)  # fmt: skip
small("a scalar scale", net(lambda m, x: m.b(m.a(x).relu() * m.g), a=L(3, 4), b=L(4, 2),
      g=parameter(1)), (6, 3))  # fmt: skip
small("temperature", net(lambda m, x: (m.a(x) * m.g).softmax(1), a=L(3, 4), g=nn.Parameter(
      torch.tensor(1.5))), (6, 3))  # fmt: skip
small("positions that are learned", net(lambda m, x: m.b((m.a(x) + m.p).relu()), a=L(3, 4),
      b=L(4, 2), p=parameter(1, 2, 4)), (6, 2, 3))  # fmt: skip
small("bilinear", net(lambda m, x: m.c(m.b(m.a(x).relu(), x).relu()), a=L(3, 2),
      b=nn.Bilinear(2, 3, 3), c=L(3, 2)), (8, 3))  # fmt: skip

# --- weights used in other ways ----------------------------------------------------------------
small("x @ self.w", net(lambda m, x: ((x @ m.w).relu() @ m.v) + m.b, w=parameter(3, 4),
      v=parameter(4, 2), b=parameter(2)), (6, 3))  # fmt: skip
small("F.linear(x, self.w)", net(lambda m, x: F.linear(F.linear(x, m.w, m.b).relu(), m.v),
      w=parameter(4, 3), v=parameter(2, 4), b=parameter(4)), (6, 3))  # fmt: skip
small("einsum", net(lambda m, x: torch.einsum("nk,ko->no", torch.einsum("ni,ki->nk", x, m.w).relu(),
      m.v), w=parameter(4, 3), v=parameter(4, 2)), (6, 3))  # fmt: skip
small("addmm", net(lambda m, x: torch.addmm(m.b, x, m.w).relu() @ m.v, w=parameter(3, 4),
      v=parameter(4, 2), b=parameter(4)), (6, 3))  # fmt: skip
small("shared layer", net(lambda m, x: m.c(m.b(m.b(m.a(x).relu()).relu()).relu()), a=L(3, 3),
      b=L(3, 3), c=L(3, 2)), (8, 3))  # fmt: skip
small("shared convolution", net(lambda m, x: m.c(m.b(m.b(m.a(x).relu()).relu())), a=C(2, 2, 1),
      b=C(2, 2, 1), c=C(2, 1, 1)), IMAGE)  # fmt: skip
small("siamese", net(lambda m, x, y: m.b((m.a(x).relu() - m.a(y).relu()).abs()), a=L(3, 4), b=L(4, 1)),
      (6, 3), (6, 3))  # fmt: skip
small("transposed autoencoder", net(lambda m, x: F.linear(F.linear(x, m.w).relu(), m.w.t()),
      w=parameter(4, 3)), (6, 3))  # fmt: skip
small("transposed inside", net(lambda m, x: m.b(F.linear(F.linear(m.a(x).relu(), m.w).relu(),
      m.w.t()).relu()), a=L(3, 3), w=parameter(4, 3), b=L(3, 2)), (8, 3))  # fmt: skip
small("weights stacked", net(lambda m, x: m.b(F.linear(x, torch.cat([m.w, m.v])).relu()),
      w=parameter(2, 3), v=parameter(2, 3), b=L(4, 2)), (6, 3))  # fmt: skip
small("weight by its norm", net(lambda m, x: m.b(F.linear(x, m.g * m.v / m.v.norm(dim=1, keepdim=True))
      .relu()), v=parameter(4, 3), g=parameter(4, 1), b=L(4, 2)), (6, 3))  # fmt: skip
small("masked weight", net(lambda m, x: m.b(F.linear(x, m.w * m.mask).relu()), w=parameter(4, 3),
      b=L(4, 2), mask=torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 1, 1]])), (6, 3))  # fmt: skip

# --- attention ---------------------------------------------------------------------------------


def _attend(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    return m.o((q @ k.transpose(1, 2)).softmax(-1) @ v)


small("attention", net(_attend, q=L(3, 2), k=L(3, 2), v=L(3, 2), o=L(2, 2)), (3, 4, 3))
small("attention function", net(lambda m, x: m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))),
      q=L(3, 2, False), k=L(3, 2, False), v=L(3, 2, False), o=L(2, 2, False)), (3, 4, 3))  # fmt: skip


def _heads(m: Any, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q, k, v = (z.view(n, t, 2, 2).transpose(1, 2) for z in m.qkv(x).chunk(3, dim=-1))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 4)
    return m.o(y)


small("attention with two heads", net(_heads, qkv=L(2, 12), o=L(4, 2)), (3, 3, 2))
small("multi-head attention", net(lambda m, x: m.o(m.a(x, x, x, need_weights=False)[0].relu()),
      a=nn.MultiheadAttention(2, 1, batch_first=True), o=L(2, 1)), (4, 3, 2))  # fmt: skip
small("attention pooling", net(lambda m, x: m.c((m.a(x) * m.s(x).softmax(1)).sum(1)), a=L(3, 4),
      s=L(3, 1), c=L(4, 2)), (4, 3, 3))  # fmt: skip


class Block(nn.Module):
    """A transformer block of four channels and two heads."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(4), nn.LayerNorm(4)
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
        self.patches, self.block = C(2, 4, 2, 2), Block(nn.GELU())
        self.token, self.positions = parameter(1, 1, 4), parameter(1, 5, 4)
        self.norm, self.head = nn.LayerNorm(4), L(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.block(x))[:, 0])


_LAYER = {"d_model": 4, "nhead": 2, "dim_feedforward": 3, "batch_first": True, "dropout": 0.0}
small("transformer block with relu", lambda: Block(nn.ReLU()), (2, 3, 4))
small("vision transformer", Vit, (4, 2, 4, 4))
small("encoder layer", lambda: nn.TransformerEncoderLayer(**_LAYER), (2, 3, 4))
small("decoder layer", lambda: nn.TransformerDecoderLayer(**_LAYER), (2, 3, 4), (2, 3, 4))

# --- more architectures ------------------------------------------------------------------------


def _convnext(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    y = m.narrow(F.relu(m.wide(m.norm(m.depth(x).permute(0, 2, 3, 1))))) * m.scale
    return m.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


small("convnext block", net(_convnext, stem=C(2, 2, 1), depth=C(2, 2, 3, 1, 1, groups=2),
      norm=nn.LayerNorm(2), wide=L(2, 3), narrow=L(3, 2), scale=parameter(2), head=L(2, 2)),
      (4, 2, 4, 4))  # fmt: skip
small("pointnet", net(lambda m, x: m.c(m.b(m.a(x).relu()).max(dim=2)[0]), a=nn.Conv1d(3, 4, 1),
      b=nn.Conv1d(4, 3, 1), c=L(3, 2)), (4, 3, 5))  # fmt: skip
small("feature pyramid", net(lambda m, x: (lambda y: m.o((m.l(y) + F.interpolate(m.t(F.max_pool2d(y, 2)),
      scale_factor=2)).relu()))(m.a(x).relu()), a=C(2, 3, 1), l=C(3, 2, 1), t=C(3, 2, 1),
      o=C(2, 1, 1)), (4, 2, 4, 4))  # fmt: skip
small("mlp mixer", net(lambda m, x: m.c(m.t(m.s(m.a(x).transpose(1, 2)).relu()).transpose(1, 2)),
      a=L(3, 4), s=L(3, 3), t=L(3, 3), c=L(4, 2)), (4, 3, 3))  # fmt: skip
small(
    "maxout", net(lambda m, x: m.c(m.a(x).view(-1, 4, 2).max(-1)[0]), a=L(3, 8), c=L(4, 2)), (6, 3)
)
small("experts", net(lambda m, x: (m.r(x).softmax(-1)[..., None] * torch.stack([m.b(m.a(x).relu()),
      m.d(m.c(x).relu())], 1)).sum(1), r=L(3, 2), a=L(3, 3), b=L(3, 2), c=L(3, 3), d=L(3, 2)),
      (8, 3))  # fmt: skip
small("two towers", net(lambda m, x, y: (m.a(x).relu() * m.b(y).relu()).sum(1), a=L(3, 4),
      b=L(2, 4)), (6, 3), (6, 2))  # fmt: skip
small("gram matrix", net(lambda m, x: m.c((lambda y: y @ y.transpose(1, 2))(m.a(x).relu()).flatten(1)),
      a=L(3, 2), c=L(9, 2)), (8, 3, 3))  # fmt: skip
small("outer product", net(lambda m, x: m.c(torch.einsum("ni,nj->nij", m.a(x), m.b(x)).flatten(1)),
      a=L(3, 2), b=L(3, 2), c=L(4, 2)), (8, 3))  # fmt: skip
small("highway", net(lambda m, x: (lambda h, g: m.c(g * m.b(h).relu() + (1 - g) * h))(m.a(x).relu(),
      m.g(x).sigmoid()), a=L(3, 4), b=L(4, 4), g=L(3, 4), c=L(4, 2)), (6, 3))  # fmt: skip
small("both signs", net(lambda m, x: (lambda y: m.c(torch.cat([y, -y], 1).relu()))(m.a(x)),
      a=C(2, 2, 1), c=C(4, 1, 1)), IMAGE)  # fmt: skip
small("standardized convolution", net(lambda m, x: m.b(F.conv2d(x, (m.w - m.w.mean((1, 2, 3), True))
      / m.w.std((1, 2, 3), keepdim=True) * m.g).relu()), w=parameter(3, 2, 2, 2),
      g=parameter(3, 1, 1, 1), b=C(3, 2, 1)), IMAGE)  # fmt: skip
small("choice", net(lambda m, x: m.c(torch.where(m.a(x) > 0, m.a(x), m.b(x))), a=L(3, 4), b=L(3, 4),
      c=L(4, 2)), (6, 3))  # fmt: skip
small("running sum", net(lambda m, x: m.c(m.a(x).cumsum(1)), a=L(3, 4), c=L(4, 2)), (4, 3, 3))
small("reflected borders", seq(C(2, 3, 3, padding=1, padding_mode="reflect"), R(),
      C(3, 2, 3, padding=1, padding_mode="circular")), IMAGE)  # fmt: skip
small("y over its norm", net(lambda m, x: (lambda y: m.c(y / y.norm(dim=1, keepdim=True)))(m.a(x)),
      a=L(3, 4), c=L(4, 2)), (6, 3))  # fmt: skip
