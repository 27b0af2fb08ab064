"""A U-Net without normalization layers (after Ronneberger, Fischer and Brox, 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

WIDTHS = (32, 64, 128, 256, 512)


class UNet(nn.Module):
    """Encoder and decoder with a skip connection, by concatenation, at every resolution.

    widths: channels per resolution, finest first; each is halved in height and width by max pooling
    and doubled again by a transposed convolution. Each resolution has two padded 3x3 convolutions
    with ReLU on the way down and two on the way up.

    Shapes: input (N, channels, H, W), output (N, classes, H, W); H and W are multiples of
    2 ** (len(widths) - 1).
    """

    def __init__(self, channels: int = 3, classes: int = 2, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"a U-Net has two resolutions or more, not widths {tuple(widths)}")
        upwards = list(pairwise(reversed(widths)))
        self.encoders = nn.ModuleList(_double(i, o) for i, o in pairwise([channels, *widths]))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in upwards)
        self.decoders = nn.ModuleList(_double(2 * o, o) for _, o in upwards)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for encoder in self.encoders:
            x = encoder(self.pool(x) if skips else x)
            skips.append(x)
        skips.pop()
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = decoder(torch.cat([skips.pop(), up(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits


def _double(fan_in: int, fan_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(fan_in, fan_out, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(fan_out, fan_out, 3, padding=1),
        nn.ReLU(),
    )
