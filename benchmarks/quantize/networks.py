"""Five small networks for images of 28x28 pixels, and the pairs of layers that a person finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CLASSES = 10
Weighted = nn.Conv2d | nn.Linear


class Layer(nn.Module):
    """A convolution and the BatchNorm after it, or Identity where there is none."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1,
        norm: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=not norm
        )
        self.norm: nn.Module = nn.BatchNorm2d(outputs) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y: Tensor = self.norm(self.conv(x))
        return y


class Block(nn.Module):
    """Two convolutions of 3x3 beside a shortcut, which is a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.first = Layer(inputs, outputs, 3, stride=stride, norm=norm)
        self.second = Layer(outputs, outputs, 3, norm=norm)
        changes = inputs != outputs or stride != 1
        self.shortcut: nn.Module = (
            Layer(inputs, outputs, 1, stride=stride, norm=norm) if changes else nn.Identity()
        )
        self.relu = nn.ReLU()
        if not norm:  # so that it starts as the shortcut: without norms it would not train
            nn.init.zeros_(self.second.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y: Tensor = self.relu(self.second(self.relu(self.first(x))) + self.shortcut(x))
        return y


def _mobilenet() -> nn.Sequential:
    """A stem, and four times a depthwise convolution and one of 1x1, all with BatchNorm."""
    layers: list[nn.Module] = [Layer(1, 16, 3, stride=2), nn.ReLU()]
    for inputs, outputs, stride in ((16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 2)):
        layers += [Layer(inputs, inputs, 3, stride=stride, groups=inputs), nn.ReLU()]
        layers += [Layer(inputs, outputs, 1), nn.ReLU()]
    return nn.Sequential(*layers, *_head(96))


def _resnet(norm: bool) -> nn.Sequential:
    return nn.Sequential(
        Layer(1, 16, 3, stride=2, norm=norm), nn.ReLU(),
        Block(16, 16, 1, norm), Block(16, 32, 2, norm), Block(32, 48, 2, norm),
        *_head(48),
    )  # fmt: skip


def _vgg() -> nn.Sequential:
    """Convolutions of 3x3 and pooling in turns, then two fully connected layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 48)):
        layers += [Layer(inputs, outputs, 3, norm=False), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(48 * 9, 64), nn.ReLU(), nn.Linear(64, CLASSES)
    )


def _mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES),
    )  # fmt: skip


def _head(channels: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)


BUILDERS: Mapping[str, Callable[[], nn.Sequential]] = {
    "mobilenet": _mobilenet,
    "resnet, BatchNorm": lambda: _resnet(True),
    "resnet, no BatchNorm": lambda: _resnet(False),
    "vgg": _vgg,
    "mlp": _mlp,
}


def build(name: str, seed: int) -> nn.Sequential:
    """A network with the weights that it starts training from; torch's random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BUILDERS[name]()


def fold_(model: nn.Module) -> nn.Module:
    """Fold every BatchNorm into its convolution (torch's own utility), for all methods alike."""
    model.eval()
    for layer in model.modules():
        if isinstance(layer, Layer) and isinstance(layer.norm, nn.BatchNorm2d):
            layer.conv = fuse_conv_bn_eval(layer.conv, layer.norm)
            layer.norm = nn.Identity()
    return model


def neighbours(model: nn.Sequential) -> list[tuple[Weighted, Weighted]]:
    """Pairs (producer, consumer) of layers with only ReLU and pooling in between.

    What lists of layers written by hand hold: chains, and the inside of residual blocks. What a
    shortcut ties together and what is flattened between two layers of different kinds is left out.
    """
    pairs: list[tuple[Weighted, Weighted]] = []
    last: Weighted | None = None
    for module in model:
        if isinstance(module, Block):
            pairs.append((module.first.conv, module.second.conv))
            last = None
        elif isinstance(module, Layer | nn.Linear):
            layer = module.conv if isinstance(module, Layer) else module
            if last is not None and type(last) is type(layer):
                pairs.append((last, layer))
            last = layer
    return pairs
