"""The two networks of the paper's CIFAR10 experiments (Stock et al., ICLR 2019).

Neither has biases. Weights are drawn by He's scheme. Every layer but the last is followed by
BatchNorm (if wanted) and ReLU.
"""

from __future__ import annotations

from itertools import pairwise

from torch import nn

HIDDEN = 500


def fully_connected(
    features: int, n_layers: int, classes: int, *, batchnorm: bool
) -> nn.Sequential:
    """features -> 500, n_layers times 500 -> 500, 500 -> classes: n_layers + 2 weights.

    Shapes: input (N, ...) with `features` entries per image, output (N, classes).
    """
    widths = [features, *[HIDDEN] * (n_layers + 1)]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers.append(nn.Linear(fan_in, fan_out, bias=False))
        if batchnorm:
            layers.append(nn.BatchNorm1d(fan_out))
        layers.append(nn.ReLU())
    layers.append(nn.Linear(HIDDEN, classes, bias=False))
    return _initialized(nn.Sequential(*layers))


def fully_convolutional(channels: int, classes: int, *, batchnorm: bool) -> nn.Sequential:
    """The network of Gitman and Ginsburg (2017): nine convolutions, then a global average.

    3x3 convolutions 128-128-128, max pool, 3x3 256-256-256, max pool, 3x3 320, 1x1 320,
    1x1 classes. The 3x3 convolutions are padded, so that images of 8x8 fit as well.

    Shapes: input (N, channels, H, W), output (N, classes).
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise([channels, 128, 128, 128]):
        layers += _convolution(fan_in, fan_out, 3, batchnorm=batchnorm)
    layers.append(nn.MaxPool2d(2))
    for fan_in, fan_out in pairwise([128, 256, 256, 256]):
        layers += _convolution(fan_in, fan_out, 3, batchnorm=batchnorm)
    layers.append(nn.MaxPool2d(2))
    layers += _convolution(256, 320, 3, batchnorm=batchnorm)
    layers += _convolution(320, 320, 1, batchnorm=batchnorm)
    layers += [
        nn.Conv2d(320, classes, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return _initialized(nn.Sequential(*layers))


def _convolution(fan_in: int, fan_out: int, size: int, *, batchnorm: bool) -> list[nn.Module]:
    convolution = nn.Conv2d(fan_in, fan_out, size, padding=size // 2, bias=False)
    norm: list[nn.Module] = [nn.BatchNorm2d(fan_out)] if batchnorm else []
    return [convolution, *norm, nn.ReLU()]


def _initialized(model: nn.Sequential) -> nn.Sequential:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return model
