"""Small models: products of activations, and weights that are used in unusual ways."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.support.zoo_kit import C, L, chain, parameter, small

IMAGE = (4, 2, 5, 5)

# --- products ------------------------------------------------------------


@small("gated by relu", (6, 3), a=L(3, 4), b=L(3, 4), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.a(x).relu() * m.b(x))


@small("gated by sigmoid", (6, 3), a=L(3, 4), b=L(3, 4), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.a(x).sigmoid() * m.b(x))


@small("gated by silu", (6, 3), a=L(3, 4), b=L(3, 4), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c(F.silu(m.a(x)) * m.b(x))


chain("glu", (6, 3), L(3, 4), nn.GLU(1), L(2, 2))


@small("gate in a residual stream", (6, 3), a=L(3, 4), b=L(4, 4), c=L(4, 4), d=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    return m.d(h + m.b(h).relu() * m.c(h))


@small("square", (6, 3), a=L(3, 4), b=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).relu() ** 2)


@small("y * y", (6, 3), a=L(3, 4), b=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.b(y * y)


@small("y * relu(y)", (6, 3), a=L(3, 4), b=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.b(y * y.relu())


@small("y + y * y", (6, 3), a=L(3, 4), b=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.b(y + y * y)


@small("division", (6, 3), a=L(3, 4), b=L(3, 4), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.a(x).relu() / m.b(x).exp())


@small("division by abs", (6, 3), a=L(3, 4), b=L(3, 4), c=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.a(x) / m.b(x).abs())


@small("division by the norm", (6, 3), a=L(3, 4), b=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.b(y / y.abs().sum(1, True))


@small("root of squares", (6, 3), a=L(3, 4), b=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).square().sqrt())


@small("a constant is added", (6, 3), a=L(3, 4), b=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).relu() + 1)


@small("a scale of one's own", (6, 3), a=L(3, 4), b=L(4, 2), g=parameter(4))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).relu() * m.g)


@small("layer scale", (6, 3), a=L(3, 4), b=L(4, 4), d=L(4, 2), g=parameter(4))
def _(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    return m.d(h + m.g * m.b(h).relu())


@small("a channel scale of images", IMAGE, a=C(2, 3, 1), b=C(3, 1, 1), g=parameter(1, 3, 1, 1))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).relu() * m.g)


@small("a scalar scale", (6, 3), a=L(3, 4), b=L(4, 2), g=parameter(1))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).relu() * m.g)


@small("temperature", (6, 3), a=L(3, 4), g=nn.Parameter(torch.tensor(1.5)))
def _(m: Any, x: Tensor) -> Any:
    return (m.a(x) * m.g).softmax(1)


@small("positions that are learned", (6, 2, 3), a=L(3, 4), b=L(4, 2), p=parameter(1, 2, 4))
def _(m: Any, x: Tensor) -> Any:
    return m.b((m.a(x) + m.p).relu())


@small("bilinear", (8, 3), a=L(3, 2), b=nn.Bilinear(2, 3, 3), c=L(3, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.b(m.a(x).relu(), x).relu())


# --- weights used in other ways ------------------------------------------------------------


@small("x @ self.w", (6, 3), w=parameter(3, 4), v=parameter(4, 2), b=parameter(2))
def _(m: Any, x: Tensor) -> Any:
    return (x @ m.w).relu() @ m.v + m.b


@small("F.linear(x, self.w)", (6, 3), w=parameter(4, 3), v=parameter(2, 4), b=parameter(4))
def _(m: Any, x: Tensor) -> Any:
    return F.linear(F.linear(x, m.w, m.b).relu(), m.v)


@small("einsum", (6, 3), w=parameter(4, 3), v=parameter(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return torch.einsum("nk,ko->no", torch.einsum("ni,ki->nk", x, m.w).relu(), m.v)


@small("addmm", (6, 3), w=parameter(3, 4), v=parameter(4, 2), b=parameter(4))
def _(m: Any, x: Tensor) -> Any:
    return torch.addmm(m.b, x, m.w).relu() @ m.v


@small("shared layer", (8, 3), a=L(3, 3), b=L(3, 3), c=L(3, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.b(m.b(m.a(x).relu()).relu()).relu())


@small("shared convolution", IMAGE, a=C(2, 2, 1), b=C(2, 2, 1), c=C(2, 1, 1))
def _(m: Any, x: Tensor) -> Any:
    return m.c(m.b(m.b(m.a(x).relu()).relu()))


@small("siamese", (6, 3), (6, 3), a=L(3, 4), b=L(4, 1))
def _(m: Any, x: Tensor, y: Tensor) -> Any:
    return m.b((m.a(x).relu() - m.a(y).relu()).abs())


@small("transposed autoencoder", (6, 3), w=parameter(4, 3))
def _(m: Any, x: Tensor) -> Any:
    return F.linear(F.linear(x, m.w).relu(), m.w.t())


@small("transposed inside", (8, 3), a=L(3, 3), w=parameter(4, 3), b=L(3, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(F.linear(F.linear(m.a(x).relu(), m.w).relu(), m.w.t()).relu())


@small("weights stacked", (6, 3), w=parameter(2, 3), v=parameter(2, 3), b=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(F.linear(x, torch.cat([m.w, m.v])).relu())


@small("weight by its norm", (6, 3), v=parameter(4, 3), g=parameter(4, 1), b=L(4, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(F.linear(x, m.g * m.v / m.v.norm(dim=1, keepdim=True)).relu())


@small(
    "masked weight",
    (6, 3),
    w=parameter(4, 3),
    b=L(4, 2),
    mask=torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 1, 1]]),
)
def _(m: Any, x: Tensor) -> Any:
    return m.b(F.linear(x, m.w * m.mask).relu())


def _normed(layer: nn.Module, **options: Any) -> nn.Module:
    return parametrizations.weight_norm(layer, **options)


chain("weight norm, read by a plain layer", (6, 3), _normed(L(3, 4)), nn.ReLU(), L(4, 2))
chain("weight norm", (6, 3), _normed(L(3, 4)), nn.ReLU(), _normed(L(4, 3)), nn.ReLU(), L(3, 2))
chain("weight norm over all", (6, 3), _normed(L(3, 4), dim=None), nn.ReLU(), L(4, 2))
chain(
    "weight norm per input", (6, 3), L(3, 4), nn.ReLU(), _normed(L(4, 3), dim=1), nn.ReLU(), L(3, 2)
)
chain(
    "weight norm of convolutions", IMAGE, _normed(C(2, 4, 1)), nn.ReLU(),
    _normed(C(4, 4, 3, groups=2)), nn.ReLU(), _normed(nn.ConvTranspose2d(4, 2, 1)),
)  # fmt: skip


@small("weight norm before a slice", (6, 3), a=_normed(L(3, 5)), b=L(3, 2))
def _(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).relu()[:, 1:4])


chain("spectral norm", (6, 3), parametrizations.spectral_norm(L(3, 4)).eval(), nn.ReLU(), L(4, 2))
