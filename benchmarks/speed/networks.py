"""The networks whose step is timed: the paper's two, and the usual shapes around them.

Each can be had without normalization, with BatchNorm and with GroupNorm where that makes sense, so
that the cost of these can be set against ENorm's.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50, vgg16

import enorm_fx
from benchmarks.models import fully_connected, fully_convolutional, group_norm
from enorm_fx import Plan

NORMS = ("none", "batch", "group")


@dataclass(frozen=True, slots=True)
class Network:
    """A network and a batch for it.

    build: kind of normalization -> model. norms: the kinds it can be had with. own: the kind that
    the network is known with, on which ENorm is timed. inputs: shape of a batch, "tokens" if
    integers are wanted. classes: of the cross-entropy, one label an output row.
    """

    name: str
    build: Callable[[str], nn.Module]
    shape: tuple[int, ...]
    classes: int
    norms: tuple[str, ...] = NORMS
    own: str = "none"
    tokens: bool = False

    def inputs(self, device: torch.device) -> Tensor:
        """A random batch: float32, or int64 tokens."""
        if self.tokens:
            return torch.randint(self.classes, self.shape, device=device)
        return torch.randn(self.shape, device=device)


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """A model that trains: its optimizer has state, every parameter has a gradient."""

    model: nn.Module
    optimizer: torch.optim.SGD
    inputs: Tensor
    labels: Tensor

    def train_step(self) -> None:
        """Forward, backward, one fused SGD step."""
        self.optimizer.zero_grad()
        output = self.model(self.inputs)
        logits = getattr(output, "logits", output).flatten(0, -2)
        nn.functional.cross_entropy(logits, self.labels).backward()
        self.optimizer.step()

    def analyze(self) -> Plan:
        """The plan with defaults: it looks through BatchNorm, as the paper does."""
        return enorm_fx.analyze(self.model, self.inputs)


def set_up(network: Network, norm: str, device: torch.device) -> Setup:
    """The network with that normalization, with random gradients and momentum.

    The learning rate is 0, so that no repetition drifts; the SGD step's arithmetic is the same.
    """
    model = network.build(norm).to(device).train()
    inputs = network.inputs(device)
    rows = math.prod(network.shape) if network.tokens else network.shape[0]
    labels = torch.randint(network.classes, (rows,), device=device)
    return Setup(model, with_state(model), inputs, labels)


def with_state(model: nn.Module) -> torch.optim.SGD:
    """A fused SGD optimizer with momentum that has made one step on random gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True)
    optimizer.step()
    return optimizer


def stack(width: int, weights: int, classes: int = 0) -> nn.Sequential:
    """Linear layers of one width without biases, a ReLU between each two.

    Shapes: input (N, width), output (N, classes or width).
    """
    widths = [*[width] * weights, classes or width]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        linear = nn.Linear(fan_in, fan_out, bias=False)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def normalized(layers: nn.Sequential, norm: str) -> nn.Sequential:
    """The same layers, each that a ReLU follows with a normalization layer between the two."""
    out: list[nn.Module] = []
    for layer, following in pairwise([*layers, nn.Identity()]):
        out.append(layer)
        if norm == "none" or not isinstance(following, nn.ReLU):
            continue
        if isinstance(layer, nn.Linear):
            features = layer.out_features
            out.append(nn.BatchNorm1d(features) if norm == "batch" else group_norm(features))
        elif isinstance(layer, nn.Conv2d):
            channels = layer.out_channels
            out.append(nn.BatchNorm2d(channels) if norm == "batch" else group_norm(channels))
    return nn.Sequential(*out)


def _fully_connected(norm: str) -> nn.Module:
    return normalized(fully_connected(3 * 32 * 32, 15, 10), norm)


def _fully_convolutional(norm: str) -> nn.Module:
    return normalized(fully_convolutional(3, 10), norm)


def _resnet(build: Callable[..., nn.Module], norm: str) -> nn.Module:
    layers = {"none": nn.Identity, "batch": nn.BatchNorm2d, "group": group_norm}
    model: nn.Module = build(weights=None, num_classes=10, norm_layer=layers[norm])
    return model


def _vgg16(norm: str) -> nn.Module:
    whole = vgg16(weights=None)
    whole.features = normalized(whole.features, norm)  # as vgg16_bn has it
    model: nn.Module = whole
    return model


def _mlp(norm: str) -> nn.Module:
    return normalized(stack(64, 50, 10), norm)


def _llama(norm: str) -> nn.Module:
    """12 layers of width 768, grouped queries, its head apart from its embedding: 101M."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, vocab_size=16384, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "eager"  # its masks and shapes are plain tensors
    model: nn.Module = LlamaForCausalLM(config)
    return model


def networks() -> dict[str, Network]:
    """By name; the Llama needs transformers."""
    images = (8, 3, 64, 64)
    found = [
        Network("fully connected", _fully_connected, (256, 3, 32, 32), 10),
        Network("fully convolutional", _fully_convolutional, (32, 3, 32, 32), 10),
        Network("resnet18", partial(_resnet, resnet18), images, 10, own="batch"),
        Network("resnet50", partial(_resnet, resnet50), images, 10, own="batch"),
        Network("vgg16", _vgg16, images, 1000),
        Network("MLP 50 x 64", _mlp, (256, 64), 10),
    ]
    if importlib.util.find_spec("transformers"):
        found.append(
            Network("Llama 101M", _llama, (1, 128), 16384, norms=("own",), own="own", tokens=True)
        )
    return {network.name: network for network in found}


def describe(network: Network, setup: Setup, plan: Plan) -> dict[str, Any]:
    """What a reader needs to know of it, in JSON types."""
    return {
        "parameters": sum(parameter.numel() for parameter in setup.model.parameters()),
        "tensors": sum(1 for _ in setup.model.parameters()),
        "groups": len(plan.groups),
        "scales": plan.num_scales,
        "norm": network.own,
        "batch": list(network.shape),
    }
