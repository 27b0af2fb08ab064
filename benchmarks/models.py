"""The networks that the training benchmarks train.

The first two are those of the paper's CIFAR10 experiments (Stock et al., ICLR 2019): no biases, and
weights drawn by He's scheme. Every layer but the last is followed by a normalization (if wanted:
"bn", "gn" or "none") and ReLU.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, CHANNELS, RESIDUAL, VGG, EMBEDDING = 500, 128, 16, 32, 64
NORMS = ("bn", "gn", "none")


def fully_connected(
    features: int, n_layers: int, classes: int, *, norm: str = "none", width: int = HIDDEN
) -> nn.Sequential:
    """features -> width, n_layers times width -> width, width -> classes: n_layers + 2 weights.

    Shapes: input (N, ...) with `features` entries per image, output (N, classes).
    """
    widths = [features, *[width] * (n_layers + 1)]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers.append(nn.Linear(fan_in, fan_out, bias=False))
        layers += _normalization(norm, fan_out, nn.BatchNorm1d)
        layers.append(nn.ReLU())
    layers.append(nn.Linear(width, classes, bias=False))
    return _initialized(nn.Sequential(*layers))


def fully_convolutional(
    channels: int, classes: int, *, norm: str = "none", width: int = CHANNELS
) -> nn.Sequential:
    """The network of Gitman and Ginsburg (2017): nine convolutions, then a global average.

    At its width of 128: 3x3 convolutions 128-128-128, max pool, 3x3 256-256-256, max pool, 3x3 320,
    1x1 320, 1x1 classes. The 3x3 convolutions are padded, so that images of 8x8 fit as well.

    Shapes: input (N, channels, H, W), output (N, classes).
    """
    double, top = 2 * width, width * 5 // 2
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise([channels, width, width, width]):
        layers += _convolution(fan_in, fan_out, 3, norm)
    layers.append(nn.MaxPool2d(2))
    for fan_in, fan_out in pairwise([width, double, double, double]):
        layers += _convolution(fan_in, fan_out, 3, norm)
    layers.append(nn.MaxPool2d(2))
    layers += _convolution(double, top, 3, norm)
    layers += _convolution(top, top, 1, norm)
    layers += [
        nn.Conv2d(top, classes, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return _initialized(nn.Sequential(*layers))


def _convolution(fan_in: int, fan_out: int, size: int, norm: str) -> list[nn.Module]:
    convolution = nn.Conv2d(fan_in, fan_out, size, padding=size // 2, bias=False)
    return [convolution, *_normalization(norm, fan_out, nn.BatchNorm2d), nn.ReLU()]


def _normalization(
    norm: str, channels: int, batchnorm: type[nn.BatchNorm1d] | type[nn.BatchNorm2d]
) -> list[nn.Module]:
    layers = {"bn": batchnorm, "gn": group_norm}
    return [layers[norm](channels)] if norm in layers else []


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, as in Wu and He (2018), of at least 4 channels where there are so many."""
    most = max(1, min(32, channels // 4))
    groups = next(count for count in range(most, 0, -1) if channels % count == 0)
    return nn.GroupNorm(groups, channels)


def _initialized(model: nn.Sequential) -> nn.Sequential:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return model


class _Block(nn.Module):
    """relu(skip(x) + norm2(conv2(relu(norm1(conv1(x))))))."""

    def __init__(self, fan_in: int, fan_out: int, norm: str) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(fan_in, fan_out, 3, padding=1),
            *_normalization(norm, fan_out, nn.BatchNorm2d),
            nn.ReLU(),
            nn.Conv2d(fan_out, fan_out, 3, padding=1),
            *_normalization(norm, fan_out, nn.BatchNorm2d),
        )
        self.skip = nn.Identity() if fan_in == fan_out else nn.Conv2d(fan_in, fan_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.inner(x))


def residual(
    channels: int, classes: int, *, norm: str = "none", width: int = RESIDUAL
) -> nn.Sequential:
    """A stem, two blocks of `width`, pool, two blocks of twice that, a linear classifier: biases.

    Shapes: input (N, channels, H, W), output (N, classes).
    """
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        *_normalization(norm, width, nn.BatchNorm2d),
        nn.ReLU(),
        _Block(width, width, norm),
        _Block(width, width, norm),
        nn.MaxPool2d(2),
        _Block(width, 2 * width, norm),
        _Block(2 * width, 2 * width, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


def vgg(channels: int, classes: int, *, norm: str = "none", width: int = VGG) -> nn.Sequential:
    """Pairs of 3x3 convolutions of `width` and of twice that, each before a pool, two linear
    layers: no skips, biases, He's weights.

    Shapes: input (N, channels, H, W), output (N, classes).
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((channels, width), (width, 2 * width)):
        for inputs in (fan_in, fan_out):
            layers += [nn.Conv2d(inputs, fan_out, 3, padding=1)]
            layers += [*_normalization(norm, fan_out, nn.BatchNorm2d), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    layers += [nn.Linear(8 * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, classes)]
    return _initialized(nn.Sequential(*layers))


class _Decoder(nn.Module):
    """x + attention(norm(x)), then x + down(relu(up(norm(x)))); each position sees those before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(x)
        query, key, value = (
            layer(inner).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        read: Tensor = self.down(F.relu(self.up(self.norm2(x))))
        return x + read


class Transformer(nn.Module):
    """A language model: decoder layers with four heads, norms before them, learned positions.

    Shapes: input (N, T) int64, output (N, classes, T): what the next character may be.
    """

    def __init__(self, length: int, classes: int, *, n_layers: int, width: int = EMBEDDING) -> None:
        super().__init__()
        self.tokens = nn.Embedding(classes, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.Sequential(*(_Decoder(width, 4) for _ in range(n_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.layers(self.tokens(x) + self.positions)))
        return logits.transpose(1, 2)
