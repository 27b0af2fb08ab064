"""Quantization by torchao, of every linear layer but the head.

"W8A8": weights in 8 bits with a scale for each output channel, activations in 8 bits with one for
each token, found as the model runs; both symmetric. "W4A16": weights in 4 bits, asymmetric, with a
scale for each run of 64 inputs. torchao's packed kernels of 4 bits run on GPUs alone, so the
weights are those of its `IntxWeightOnlyConfig`, which it stores as integers and multiplies as
floats.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.quantize.llama.methods import GROUP


def _w8a8() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _w4a16() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    bits: Any = torch.int4  # type: ignore[attr-defined]
    return IntxWeightOnlyConfig(
        weight_dtype=bits, granularity=PerGroup(GROUP), mapping_type=MappingType.ASYMMETRIC
    )


SETTINGS: Mapping[str, Callable[[], Any]] = {"W8A8": _w8a8, "W4A16": _w4a16}


def quantized(model: nn.Module, setting: str) -> nn.Module:
    """A copy that is quantized, in one of SETTINGS."""
    from torchao.quantization import quantize_

    copied = copy.deepcopy(model)
    quantize_(copied, SETTINGS[setting](), filter_fn=_counts)
    return copied


def _counts(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"
