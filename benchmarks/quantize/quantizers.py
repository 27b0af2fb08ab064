"""Fake quantization with torch's own observers (`torch.ao.quantization`), nothing home-made.

Weights: symmetric, one scale for a tensor or one for each output channel, from the largest |w|.
Activations: what each convolution and linear layer reads, 8 bits, asymmetric, one scale for a
tensor, from the smallest and largest value during calibration. Biases stay in float.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MinMaxObserver, PerChannelMinMaxObserver

LAYERS = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True, slots=True)
class Setting:
    """bits: of the weights; channels: a scale for each output channel; activations: 8 bits too."""

    bits: int
    channels: bool
    activations: bool


SETTINGS: Mapping[str, Setting] = {
    "W8 tensor": Setting(8, False, False),
    "W8 channel": Setting(8, True, False),
    "W4 tensor": Setting(4, False, False),
    "W4 channel": Setting(4, True, False),
    "W8A8 tensor": Setting(8, False, True),
    "W8A8 channel": Setting(8, True, True),
    "W4A8 tensor": Setting(4, False, True),
    "W4A8 channel": Setting(4, True, True),
}


@torch.no_grad()
def quantized(model: nn.Module, setting: Setting, calibration: Tensor) -> nn.Module:
    """A copy whose weights are quantized, and whose activations are with calibrated scales."""
    copied = copy.deepcopy(model)
    layers = [module for module in copied.modules() if isinstance(module, LAYERS)]
    for layer in layers:
        layer.weight.copy_(_of_weights(setting)(layer.weight))
    if not setting.activations:
        return copied
    readers = [_of_activations() for _ in layers]
    for layer, reader in zip(layers, readers, strict=True):
        reader.disable_fake_quant()
        layer.register_forward_pre_hook(_reading(reader))
    copied(calibration)
    for reader in readers:
        reader.disable_observer()
        reader.enable_fake_quant()
    return copied


def _of_weights(setting: Setting) -> FakeQuantize:
    largest = 2 ** (setting.bits - 1) - 1
    limits = {"quant_min": -largest, "quant_max": largest, "dtype": torch.qint8}
    if setting.channels:
        scheme = torch.per_channel_symmetric
        return FakeQuantize(PerChannelMinMaxObserver, qscheme=scheme, ch_axis=0, **limits)
    return FakeQuantize(MinMaxObserver, qscheme=torch.per_tensor_symmetric, **limits)


def _of_activations() -> FakeQuantize:
    return FakeQuantize(
        MinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8,
        qscheme=torch.per_tensor_affine,
    )  # fmt: skip


def _reading(reader: FakeQuantize) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (reader(inputs[0]), *inputs[1:])

    return hook
