"""Example inputs: what the caller gave, or shapes that the model's first layers admit."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from enorm_fx.errors import ArgumentError
from enorm_fx.nested import tensors_anywhere

Call = tuple[tuple[Any, ...], dict[str, Any]]

_IMAGE_SIZES = (224, 32, 28, 64, 96, 128, 256, 299, 384, 512)
_VOLUMES = ((16, 112, 112), (8, 32, 32), (32, 32, 32), (64, 64, 64))
_LENGTHS = (128, 1024, 16, 16000)
_BATCH = 2  # more than one, so that no op mistakes the batch axis for one of size 1


def as_call(example_inputs: Any) -> Call:
    """A tensor, a tuple of positional inputs or a dict of keyword inputs as (args, kwargs)."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, dict) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    raise ArgumentError(
        "example_inputs must be None, a tensor, a tuple of positional inputs or a dict of keyword "
        f"inputs, not {type(example_inputs).__name__}"
    )


def shapes_of(call: Any) -> str:
    """The types and shapes of the tensors in a call, for messages."""
    return ", ".join(
        f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in tensors_anywhere(call)
    )


def guesses(model: nn.Module) -> Iterator[Call]:
    """Inputs that the first layers admit, most likely first.

    Only models that take one required input are guessed at. Raises ArgumentError otherwise.
    """
    _check_one_input(model)
    seen: set[tuple[int, ...]] = set()
    for module in _first_layers(model):
        for example in _shapes(module):
            key = (*example.shape, int(example.is_floating_point()))
            if key not in seen:
                seen.add(key)
                yield (example,), {}


def _check_one_input(model: nn.Module) -> None:
    required = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) > 1:
        raise ArgumentError(
            f"{type(model).__name__}.forward takes {len(required)} inputs ({', '.join(required)}), "
            "so their shapes cannot be inferred: pass example_inputs"
        )


def _first_layers(model: nn.Module, most: int = 3) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, _LAYERS):
            yield module
            most -= 1
            if not most:
                return


_LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear, nn.Embedding, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm,
)  # fmt: skip


def _shapes(module: nn.Module) -> Iterator[Tensor]:
    weight = getattr(module, "weight", None)
    device = weight.device if isinstance(weight, Tensor) else torch.device("cpu")
    dtype = weight.dtype if isinstance(weight, Tensor) else torch.float32

    channels = int(getattr(module, "in_channels", getattr(module, "num_features", 0)))
    shapes: list[tuple[int, ...]]
    if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
        shapes = [(_BATCH, channels, n) for n in _LENGTHS]
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        shapes = [(_BATCH, channels, n, n) for n in _IMAGE_SIZES]
    elif isinstance(module, (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d)):
        shapes = [(_BATCH, channels, *volume) for volume in _VOLUMES]
    elif isinstance(module, nn.Linear):
        shapes = [(_BATCH, module.in_features), (_BATCH, 16, module.in_features)]
    elif isinstance(module, nn.BatchNorm1d):
        shapes = [(_BATCH, channels), (_BATCH, channels, 16)]
    elif isinstance(module, nn.LayerNorm):
        last = tuple(module.normalized_shape)
        shapes = [(_BATCH, *last), (_BATCH, 16, *last)]
    else:
        tokens = torch.arange(_BATCH * 16, device=device).reshape(_BATCH, 16)
        yield tokens % getattr(module, "num_embeddings", 1)
        return
    for shape in shapes:
        yield torch.empty(1, dtype=dtype, device=device).expand(shape)  # no memory, only a shape
