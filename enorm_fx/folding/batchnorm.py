"""`fold_batchnorm_`: every BatchNorm into the layer before it.

A model in evaluation computes a linear map and then a BatchNorm, which is linear too: one layer
with other weights does both. What the weights' ranges are, and so what equalization and
quantization see, is then the product. Folding is an identity of Jacob et al., Quantization and
Training of Neural Networks (arXiv:1712.05877), section 3.2; torch.nn.utils.fusion computes it.

Absorbing large biases into the next layer (Nagel et al., arXiv:1906.04721, section 4.1.3) is not
here: relu(z - c) = relu(z) - c holds where z >= c alone, which depends on data, and with padding
the next layer reads zeros where the constant would be missing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from enorm_fx.errors import ArgumentError, PlanError, TraceError
from enorm_fx.folding.proof import BATCHNORMS, LAYERS, Calls, NotFoldedError, difference
from enorm_fx.tracing import trace
from enorm_fx.tracing.trace import Trace

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True)
class Folded:
    """One BatchNorm that is gone.

    layer, batchnorm: module paths. new_bias: the layer had no bias before.
    """

    layer: str
    batchnorm: str
    new_bias: bool


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """A module (by its path; in the case of a function, the module that calls it), and why."""

    module: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Folding:
    """What `fold_batchnorm_` did.

    folded, left: every BatchNorm of the model is in one of them.
    notes: what a reader should know about the trace, as in a plan.
    model, removed: what was folded, and the BatchNorm modules that are gone, unchanged.
    """

    folded: tuple[Folded, ...]
    left: tuple[LeftAlone, ...]
    notes: tuple[str, ...]
    model: nn.Module = field(repr=False)
    removed: tuple[Any, ...] = field(repr=False)

    def put_back_(self) -> None:
        """Give the model its modules back, each BatchNorm as an identity; the function stays.

        Then the model has the keys and shapes that it had, and code that builds the original
        network loads its weights. A BatchNorm has mean 0, variance 1 - eps, gamma 1 and beta 0; in
        place of a bias that its layer did not have, beta (without affine parameters, the mean with
        its sign turned) holds it.

        Raises PlanError, with nothing changed, if a folded layer is no longer there.
        """
        pairs = list(zip(self.folded, self.removed, strict=True))
        modules: dict[str, Any] = dict(self.model.named_modules())
        for record, removed in pairs:
            layer, identity = modules.get(record.layer), modules.get(record.batchnorm)
            if not isinstance(layer, LAYERS) or type(identity) is not nn.Identity:
                raise PlanError(
                    f"'{record.layer}' and '{record.batchnorm}' are no longer what was folded: put "
                    "BatchNorm back before the modules are replaced"
                )
            if removed.weight is None and removed.eps > 1:
                raise PlanError(
                    f"'{record.batchnorm}' cannot be an identity: its eps is {removed.eps} and it "
                    "has no gamma"
                )
        with torch.no_grad():
            for record, removed in pairs:
                layer = modules[record.layer]
                offset = layer.bias.detach().clone() if record.new_bias else None
                if record.new_bias:
                    layer.bias = None
                _become_identity_(removed, offset)
                _place_(self.model, record.batchnorm, removed)

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} BatchNorm layers folded, {len(self.left)} left alone"]
        lines += [f"  {entry.batchnorm} into {entry.layer}" for entry in self.folded]
        lines += [f"  {entry.module} left alone: {entry.reason}" for entry in self.left]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def fold_batchnorm_(model: nn.Module, example_inputs: Any = None) -> Folding:
    """Fold every BatchNorm into the layer before it, in place, where that is proved exact.

    The model must be in evaluation mode, and is for evaluation afterwards. A BatchNorm is folded
    where, in all that the model does (see `analyze`), every call of it reads what one linear layer,
    convolution or transposed convolution gives, nothing else reads that or the weights of both,
    and neither of them has hooks or a second name. The layer gets the weights of both, worked out
    in float64 and rounded once, and a bias if it had none; nn.Identity takes the BatchNorm's
    place. Gradients of the layer are dropped; an optimizer still holds what is gone.

    The model is traced once more without the BatchNorms, before any number is written, to see
    that it does the rest as before.

    example_inputs: as for `analyze`.

    Raises ArgumentError or TraceError, with nothing changed.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    before = trace(model, example_inputs)
    calls = Calls(model, before)
    folded: list[Folded] = []
    left: list[LeftAlone] = []
    values: list[tuple[Tensor, Tensor]] = []
    for path, module in calls.modules.items():
        if isinstance(module, BATCHNORMS):
            try:
                layer = calls.layer_before(path, module)
                values.append(_fused(calls.modules[layer], module))
                folded.append(Folded(layer, path, calls.modules[layer].bias is None))
            except NotFoldedError as error:
                left.append(LeftAlone(path, str(error)))
    removed = tuple(calls.modules[entry.batchnorm] for entry in folded)
    result = Folding(tuple(folded), tuple(left), before.notes, model, removed)
    if folded:
        _replace_(model, result, before)
        for entry, (weight, bias) in zip(folded, values, strict=True):
            _write_(calls.modules[entry.layer], weight, bias)
    return result


def _fused(layer: Any, batchnorm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of both together, in the layer's dtype. Raises NotFoldedError."""
    wide: list[Any] = [
        None if value is None else value.detach().to("cpu", torch.float64)
        for value in (
            layer.weight, layer.bias, batchnorm.running_mean, batchnorm.running_var,
            batchnorm.weight, batchnorm.bias,
        )
    ]  # fmt: skip
    weight, *per_channel = wide
    # A transposed convolution has the outputs of one group second, and the groups' inputs first.
    transposed = isinstance(layer, _TRANSPOSED)
    groups = len(batchnorm.running_mean) // weight.shape[1] if transposed else 1
    parts = [[None] * groups if t is None else t.chunk(groups) for t in per_channel]
    fused = [
        fuse_conv_bn_weights(w, b, m, v, batchnorm.eps, g, o, transpose=transposed)
        for w, b, m, v, g, o in zip(weight.chunk(groups), *parts, strict=True)
    ]
    new_weight = torch.cat([w.detach() for w, _ in fused]).to(layer.weight)
    new_bias = torch.cat([b.detach() for _, b in fused])
    new_bias = new_bias.to(layer.weight if layer.bias is None else layer.bias)
    if not all(bool(t.isfinite().all()) for t in (new_weight, new_bias)):
        raise NotFoldedError("the folded weights would not be finite")
    return new_weight, new_bias


def _replace_(model: nn.Module, folding: Folding, before: Trace) -> None:
    """Identity for every folded BatchNorm, biases of zero; undone if the model then differs."""
    modules: dict[str, Any] = dict(model.named_modules())
    done = False
    try:
        for entry, removed in zip(folding.folded, folding.removed, strict=True):
            layer = modules[entry.layer]
            identity = nn.Identity()
            identity.training = removed.training
            _place_(model, entry.batchnorm, identity)
            if entry.new_bias:
                zeros = layer.weight.detach().new_zeros(len(removed.running_mean))
                layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)
        gone = {entry.batchnorm for entry in folding.folded}
        biases = {entry.layer for entry in folding.folded if entry.new_bias}
        args, kwargs = before.inputs
        different = difference(before, trace(model, kwargs or args), gone, biases)
        if different:
            raise TraceError(
                f"{type(model).__name__} does something else without its BatchNorm layers "
                f"({different}): nothing was folded"
            )
        done = True
    finally:
        if not done:
            for entry, removed in zip(folding.folded, folding.removed, strict=True):
                _place_(model, entry.batchnorm, removed)
                if entry.new_bias:
                    modules[entry.layer].bias = None


def _write_(layer: Any, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    layer.weight.grad = layer.bias.grad = None


def _become_identity_(batchnorm: Any, offset: Tensor | None) -> None:
    """y = x + offset, by numbers alone; float32 rounds var + eps to 1 or to its neighbour."""
    batchnorm.running_mean.zero_()
    batchnorm.running_var.fill_(max(1.0 - batchnorm.eps, 0.0))
    if batchnorm.weight is not None:
        batchnorm.weight.copy_((batchnorm.running_var.double() + batchnorm.eps).sqrt())
    if batchnorm.bias is not None:
        batchnorm.bias.zero_()
    if offset is not None and batchnorm.bias is not None:
        batchnorm.bias.copy_(offset)
    elif offset is not None:
        batchnorm.running_mean.copy_(-offset)


def _place_(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
