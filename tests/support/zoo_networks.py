"""Narrow versions of networks that people use, random in every parameter.

Each is small enough for the numerical count of its symmetries, which takes a square matrix of as
many rows as there are slices of weights.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.laws import randomized

pytest.importorskip("torchvision")

from torchvision.models import GoogLeNet
from torchvision.models.densenet import DenseNet
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.models.shufflenetv2 import ShuffleNetV2
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops import SqueezeExcitation


@dataclass(frozen=True)
class Network:
    """A network and the shapes of its inputs; `ints` of them are token numbers, not floats."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    make: Callable[[], nn.Module]
    ints: int = 0

    def build(self) -> nn.Module:
        return randomized(self.make())

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(5)
        tokens = [torch.randint(0, 5, s, generator=generator) for s in self.shapes[: self.ints]]
        images = [
            torch.randn(s, dtype=torch.float64, generator=generator)
            for s in self.shapes[self.ints :]
        ]
        return (*tokens, *images)


NETWORKS: dict[str, Network] = {}


def network(name: str, *shapes: tuple[int, ...], ints: int = 0) -> Callable[..., Any]:
    """Register what makes a network."""

    def put(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        NETWORKS[name] = Network(name, shapes, make, ints)
        return make

    return put


IMAGE = (2, 3, 8, 8)
TOKENS = (2, 4)

# --- convolutional -----------------------------------------------------------------------------


class ResNet(nn.Module):
    """torchvision's blocks; two stages of two, the second with stride."""

    def __init__(self, block: Any, planes: int, **options: Any) -> None:
        super().__init__()
        wide = planes * block.expansion
        self.stem = nn.Sequential(
            nn.Conv2d(3, planes, 3, padding=1, bias=False),
            nn.BatchNorm2d(planes), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.blocks = nn.Sequential(
            block(planes, planes, 1, self._shortcut(planes, wide, 1), **options),
            block(wide, planes, **options),
            block(wide, planes, 2, self._shortcut(wide, wide, 2), **options),
        )
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(wide, 3)

    @staticmethod
    def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
        if inputs == outputs and stride == 1:
            return None
        return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.blocks(self.stem(x)))
        return self.fc(torch.flatten(x, 1))  # type: ignore[no-any-return]


network("resnet of basic blocks", IMAGE)(lambda: ResNet(BasicBlock, 4))
network("resnet of bottlenecks", IMAGE)(lambda: ResNet(Bottleneck, 2))
network("resnext", IMAGE)(lambda: ResNet(Bottleneck, 4, groups=2, base_width=32))


class MobileNet(nn.Module):
    """torchvision's inverted residuals, with ReLU6 as there or with ReLU."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4))
        self.blocks = nn.Sequential(
            InvertedResidual(4, 4, 1, 1), InvertedResidual(4, 4, 1, 2), InvertedResidual(4, 6, 2, 2)
        )
        self.head, self.act, self.fc = nn.Conv2d(6, 8, 1), activation(), nn.Linear(8, 3)
        for module in list(self.blocks.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.ReLU6):
                    setattr(module, name, activation())

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.head(self.blocks(self.act(self.stem(x)))))
        return self.fc(x.mean([2, 3]))  # type: ignore[no-any-return]


network("mobilenet with relu6", IMAGE)(lambda: MobileNet(nn.ReLU6))
network("mobilenet with relu", IMAGE)(lambda: MobileNet(nn.ReLU))
network("shufflenet", (2, 3, 16, 16))(
    lambda: ShuffleNetV2([1, 1, 1], [4, 4, 8, 8, 8], num_classes=3)
)
network("densenet", (2, 3, 16, 16))(lambda: DenseNet(2, (2, 2), 4, bn_size=1, num_classes=3))


class Inception(nn.Module):
    """torchvision's Inception block (of its GoogLeNet) between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        block = sys.modules[GoogLeNet.__module__].Inception  # models.googlenet is a function
        self.stem, self.block = nn.Conv2d(3, 4, 3, padding=1), block(4, 2, 2, 3, 2, 2, 2)
        self.fc = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x).relu()).mean((2, 3)))  # type: ignore[no-any-return]


network("inception", IMAGE)(Inception)


class UNet(nn.Module):
    """One step down and up; the skip is concatenated."""

    def __init__(self, normalized: bool) -> None:
        super().__init__()
        self.enter, self.down = self._stage(3, 4, normalized), self._stage(4, 6, normalized)
        self.up, self.join = nn.ConvTranspose2d(6, 4, 2, stride=2), self._stage(8, 4, normalized)
        self.leave = nn.Conv2d(4, 2, 1)

    @staticmethod
    def _stage(inputs: int, outputs: int, normalized: bool) -> nn.Module:
        norm = nn.BatchNorm2d(outputs) if normalized else nn.Identity()
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), norm, nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enter(x)
        x = self.up(self.down(F.max_pool2d(skip, 2)))
        return self.leave(self.join(torch.cat([skip, x], dim=1)))  # type: ignore[no-any-return]


network("unet", IMAGE)(lambda: UNet(False))
network("unet with batch norm", IMAGE)(lambda: UNet(True))


class Excited(nn.Module):
    """Squeeze and excitation, as in MobileNetV3, between two convolutions."""

    def __init__(self, gate: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 1)
        self.excite = SqueezeExcitation(6, 3, scale_activation=gate)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.excite(self.first(x).relu()))  # type: ignore[no-any-return]


network("squeeze and excitation", IMAGE)(lambda: Excited(nn.Sigmoid))
network("squeeze and excitation, hard", IMAGE)(lambda: Excited(nn.Hardsigmoid))

# --- transformers ------------------------------------------------------------------------------

network("vision transformer", (2, 3, 8, 8))(
    lambda: VisionTransformer(8, 4, 1, 2, 4, 8, num_classes=3)
)


class Rms(nn.Module):
    """RMSNorm as it is written out in language models: no bias."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: dimension i turns with dimension i + half."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def causal(length: int) -> Tensor:
    """Minus infinity where a position would look ahead."""
    return torch.full((length, length), float("-inf")).triu(1)


class Llama(nn.Module):
    """One block: grouped-query attention, rotary positions, SwiGLU, RMSNorm."""

    cos: Tensor
    sin: Tensor

    def __init__(self, size: int = 8, heads: int = 2, groups: int = 1) -> None:
        super().__init__()
        self.heads, self.groups, self.width = heads, groups, size // heads
        self.embed, self.head = nn.Embedding(5, size), nn.Linear(size, 5, bias=False)
        self.norm1, self.norm2, self.norm3 = Rms(size), Rms(size), Rms(size)
        self.q, self.o = (nn.Linear(size, size, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(size, groups * self.width, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(size, 6, bias=False) for _ in range(2))
        self.down = nn.Linear(6, size, bias=False)
        angles = torch.outer(torch.arange(4.0), 0.1 ** torch.arange(self.width // 2))
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.width).transpose(1, 2)

    def repeat(self, x: Tensor) -> Tensor:
        n, _, length, width = x.shape
        times = self.heads // self.groups
        x = x[:, :, None].expand(n, self.groups, times, length, width)
        return x.reshape(n, self.heads, length, width)

    def attend(self, x: Tensor) -> Tensor:
        q = rotated(self.split(self.q(x), self.heads), self.cos, self.sin)
        k = rotated(self.split(self.k(x), self.groups), self.cos, self.sin)
        k, v = self.repeat(k), self.repeat(self.split(self.v(x), self.groups))
        scores = q @ k.transpose(2, 3) * self.width**-0.5 + causal(x.shape[1])
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(*x.shape)
        return self.o(y)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attend(self.norm1(x))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.norm3(x))  # type: ignore[no-any-return]


network("llama block", TOKENS, ints=1)(Llama)
network("llama block with two groups", TOKENS, ints=1)(lambda: Llama(16, 4, 2))


class T5(nn.Module):
    """One block with ReLU: relative positions are added to scores that are not divided."""

    distance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 6), nn.Linear(6, 5, bias=False)
        self.norm1, self.norm2, self.norm3 = Rms(6), Rms(6), Rms(6)
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6, bias=False) for _ in range(4))
        self.wi, self.wo = nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False)
        self.relative = nn.Embedding(4, 2)
        steps = torch.arange(4)
        self.register_buffer("distance", (steps[:, None] - steps).abs())

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], 2, 3).transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = self.norm1(x)
        q, k, v = self.split(self.q(y)), self.split(self.k(y)), self.split(self.v(y))
        bias = self.relative(self.distance).permute(2, 0, 1).unsqueeze(0)
        weights = F.softmax(torch.matmul(q, k.transpose(3, 2)) + bias, dim=-1)
        x = x + self.o(torch.matmul(weights, v).transpose(1, 2).reshape(*x.shape))
        x = x + self.wo(self.wi(self.norm2(x)).relu())
        return self.head(self.norm3(x))  # type: ignore[no-any-return]


network("t5 block", TOKENS, ints=1)(T5)


class Opt(nn.Module):
    """One block: LayerNorm, a ReLU MLP, a causal mask, learned positions, tied output."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(5, 6), nn.Embedding(6, 6)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(6) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))
        self.fc1, self.fc2, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 5, False)
        if tied:
            self.head.weight = self.embed.weight

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], 2, 3).transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1]) + 2)
        y = self.norm1(x)
        q, k, v = self.split(self.q(y) * 3**-0.5), self.split(self.k(y)), self.split(self.v(y))
        mask = torch.full((x.shape[1],) * 2, torch.finfo(x.dtype).min, dtype=x.dtype)
        y = (torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) + mask.triu(1)).softmax(-1)
        y = torch.bmm(y, v.flatten(0, 1)).view(len(x), 2, -1, 3).transpose(1, 2)
        x = x + self.o(y.reshape(*x.shape))
        x = x + self.fc2(F.relu(self.fc1(self.norm2(x))))
        return self.head(self.norm3(x))  # type: ignore[no-any-return]


network("opt block", TOKENS, ints=1)(lambda: Opt(False))
network("opt block, tied", TOKENS, ints=1)(lambda: Opt(True))


class Gated(nn.Module):
    """down(relu(gate(x)) * up(x)), or with the square of the ReLU."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.degree, self.norm = degree, nn.RMSNorm(4)
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(self.gate(y).relu() ** self.degree * self.up(y))


network("mlp gated by relu", (2, 3, 4))(lambda: Gated(1))
network("mlp gated by squared relu", (2, 3, 4))(lambda: Gated(2))


class Squared(nn.Module):
    """An MLP with the square of the ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu().square())


network("mlp with squared relu", (2, 3, 4))(Squared)

_LAYER: dict[str, Any] = {
    "d_model": 4, "nhead": 2, "dim_feedforward": 6, "batch_first": True, "dropout": 0.0
}  # fmt: skip
network("decoder layer", (2, 3, 4), (2, 4, 4))(lambda: nn.TransformerDecoderLayer(**_LAYER))
network("decoder layer, norm first", (2, 3, 4), (2, 4, 4))(
    lambda: nn.TransformerDecoderLayer(norm_first=True, **_LAYER)
)


@functools.cache
def built(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network and its inputs, which nobody writes into."""
    return NETWORKS[name].build(), NETWORKS[name].inputs()
