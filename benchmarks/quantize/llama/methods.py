"""What is done to the Llama before it is quantized; each keeps its function."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import enorm_fx

LARGER, SHARE = 30.0, 0.01  # an outlier, and how many of a group's channels are
BITS, GROUP = 4, 64  # of W4A16, which AWQ's search prepares for
ALPHA = 0.5  # llm-compressor's own
BATCH = 8

Calibration = list[dict[str, Tensor]]


def batches(windows: Tensor) -> Calibration:
    """What the model is called with, for windows of tokens (N, WINDOW)."""
    return [{"input_ids": part} for part in windows.split(BATCH)]


def plan_of(model: nn.Module, calibration: Calibration) -> enorm_fx.Plan:
    """The plan of the model, whose weights are frozen."""
    return enorm_fx.analyze(model, calibration[0], frozen="rescale")


def with_outliers(model: nn.Module, calibration: Calibration, seed: int) -> nn.Module:
    """A copy in which, of each group, 1% of the channels (at least one) is 30 times as large.

    What reads them is divided by 30: the function stays.
    """
    copied = copy.deepcopy(model)
    plan = plan_of(copied, calibration)
    generator = torch.Generator().manual_seed(seed)
    u = torch.zeros(plan.num_scales, dtype=torch.float64)
    for group in plan.groups:
        count = max(1, round(SHARE * group.channels))
        chosen = torch.randperm(group.channels, generator=generator)[:count]
        u[group.start + chosen] = math.log(LARGER)
    plan.rescale_(u)
    return copied


@torch.no_grad()
def smooth_listed_(model: Any, calibration: Calibration) -> None:
    """SmoothQuant for the pairs that llm-compressor lists for Llama, one after the other.

    s = max |X|^alpha / max |W|^(1 - alpha) divides the norm and multiplies the columns of what
    reads it (Xiao et al., arXiv:2211.10438).
    """
    pairs = listed_pairs(model)
    largest = [torch.zeros_like(norm.weight) for norm, _ in pairs]

    def watch(number: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen = output.abs().flatten(0, -2).amax(0)
            largest[number] = torch.maximum(largest[number], seen)

        return hook

    handles = [norm.register_forward_hook(watch(n)) for n, (norm, _) in enumerate(pairs)]
    for batch in calibration:
        model(**batch)
    for handle in handles:
        handle.remove()
    for (norm, readers), x in zip(pairs, largest, strict=True):
        w = torch.cat([reader.weight for reader in readers]).abs().amax(0)
        s = (x.pow(ALPHA) / w.pow(1 - ALPHA)).clamp(min=1e-5)
        norm.weight.div_(s)
        for reader in readers:
            reader.weight.mul_(s)


def listed_pairs(model: Any) -> list[tuple[Any, list[nn.Linear]]]:
    """A norm and the linear layers that read it: llm-compressor's SmoothQuant mapping of Llama."""
    pairs: list[tuple[Any, list[nn.Linear]]] = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        pairs += [
            (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
        ]
    return pairs


def _smooth(model: nn.Module, calibration: Calibration) -> None:
    enorm_fx.smooth(plan_of(model, calibration), calibration)


def _awq(model: nn.Module, calibration: Calibration) -> None:
    plan = plan_of(model, calibration)
    enorm_fx.smooth(plan, calibration, method="awq", bits=BITS, group_size=GROUP)


def _balance(model: nn.Module, calibration: Calibration, p: float) -> None:
    enorm_fx.balance(plan_of(model, calibration), p=p)


def _balance_and_smooth(model: nn.Module, calibration: Calibration) -> None:
    """`smooth` leaves queries and keys as they are; what it does for the norm before depends on
    how large they are."""
    _balance(model, calibration, 2)
    _smooth(model, calibration)


METHODS: dict[str, Callable[[Any, Calibration], object]] = {
    "plain": lambda model, calibration: None,
    "SmoothQuant, listed": smooth_listed_,
    "ours, smooth": _smooth,
    "ours, AWQ": _awq,
    "ours, p = inf": lambda model, calibration: _balance(model, calibration, math.inf),
    "ours, p = 2": lambda model, calibration: _balance(model, calibration, 2),
    "ours, p = 2, smooth": _balance_and_smooth,
}
OTHERS = ("plain", "SmoothQuant, listed")
