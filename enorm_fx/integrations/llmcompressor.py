"""Mappings for llm-compressor's SmoothQuantModifier and AWQModifier, for any model.

Both ask which module's outputs are divided by scales and which layers read them, and have lists of
names for some architectures. Here they come from the plan:

    SmoothQuantModifier(mappings=smoothquant_mappings(model))
    AWQModifier(mappings=awq_mappings(model), ...)

Needs `pip install enorm-fx[llmcompressor]`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from compressed_tensors.offload import disable_onloading
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from llmcompressor.modeling.offset_norm import norm_calibration_context
from llmcompressor.modifiers.transform.awq import AWQMapping
from torch import Tensor, nn

from enorm_fx.analysis import analyze
from enorm_fx.calibration.run import evaluating
from enorm_fx.errors import ArgumentError
from enorm_fx.plan.smoothing_pairs import SmoothingPair


def smoothquant_mappings(
    model: nn.Module, example_inputs: Any = None
) -> list[tuple[list[str], str]]:
    """`mappings` of a SmoothQuantModifier: (balance layers, smooth layer) for each pair.

    Only pairs in which the layers read what the smooth layer gives, unchanged: the modifier takes
    its statistics there.

    Args: as for `awq_mappings`.
    """
    pairs = _pairs(model, example_inputs, "smoothquant")
    return [(pair.balance_layers, pair.smooth_layer) for pair in pairs]


def awq_mappings(model: nn.Module, example_inputs: Any = None) -> list[AWQMapping]:
    """`mappings` of an AWQModifier.

    The model is analyzed as llm-compressor calibrates it: with weights w for norms that multiply
    by 1 + w, and every expert seeing every token. It is left as it was.

    Args:
        model: as it is given to `oneshot`; a mixture of experts after `linearize_moe`.
        example_inputs: as for `analyze`; None: a few tokens, for language models.

    Raises:
        ArgumentError: the experts of the model are packed.
        TraceError: the model cannot be traced with these inputs.
    """
    return [AWQMapping(*pair) for pair in _pairs(model, example_inputs, "awq")]


def _pairs(model: nn.Module, example_inputs: Any, method: str) -> tuple[SmoothingPair, ...]:
    packed = [name for name, _ in get_non_linearized_moes(model)]
    if packed:
        raise ArgumentError(
            f"the experts of '{packed[0]}' are packed into single parameters: call linearize_moe "
            "(llmcompressor.modeling.moe.linearize) on the model first, as oneshot does"
        )
    if example_inputs is None:
        example_inputs = _tokens(model)
    with (
        evaluating(model),
        disable_onloading(),  # so that a parameter is the same object at each access
        _plain_norms(model),
        _every_expert(model),
    ):
        plan = analyze(model, example_inputs, batchnorm="affine", frozen="rescale")
        return plan.smoothing_pairs(method)


def _tokens(model: nn.Module) -> dict[str, Any] | None:
    """Inputs of a language model, without a cache (what is cached leaves the model)."""
    names = inspect.signature(model.forward).parameters
    if "input_ids" not in names:
        return None
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {"input_ids": torch.arange(8, device=device)[None]}
    return {**inputs, "use_cache": False} if "use_cache" in names else inputs


@contextmanager
def _plain_norms(model: nn.Module) -> Iterator[None]:
    """Norms that multiply by 1 + w have 1 + w for a weight; afterwards they are as they were."""
    values = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        with norm_calibration_context(model):
            yield
    finally:
        for parameter, data in values:  # what it restores is rounded
            parameter.data = data


@contextmanager
def _every_expert(model: nn.Module) -> Iterator[None]:
    """Experts compute every token and their outputs are masked: no shape depends on the routing."""
    experts = [module for module in model.modules() if isinstance(module, LinearExperts2D)]
    before = [dict(module.__dict__) for module in experts]
    try:
        for module in experts:
            module.forward = functools.partial(_masked, module)
        yield
    finally:
        for module, attributes in zip(experts, before, strict=True):
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _masked(experts: LinearExperts2D, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The sum of all experts' outputs by their weights, 0 where an expert was not chosen.

    hidden (tokens, size); chosen, weights (tokens, experts per token).
    """
    share = (F.one_hot(chosen, experts.num_experts) * weights[..., None]).sum(1)
    outputs = (experts[e](hidden) * share[:, e, None] for e in range(experts.num_experts))
    return sum(outputs, start=torch.zeros_like(hidden))
