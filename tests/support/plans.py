"""Plans made by hand: small networks whose rescalings can be seen with the naked eye."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import networkx as nx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enorm_fx.model_plan import Plan
from enorm_fx.plan.records import Group, ScaledParameter
from enorm_fx.symmetry.solution import ScaleTerm

# (coefficient, scales, axis) of every term, by parameter name.
Labels = dict[str, list[tuple[float, Tensor | Sequence[int], int]]]


@dataclass(frozen=True)
class Case:
    """A network, its plan, and inputs on which its function can be compared."""

    name: str
    model: nn.Module
    plan: Plan
    inputs: Tensor


class Net(nn.Module):
    """Layers by name and a function that uses them."""

    def __init__(self, run: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def along(coefficient: float, ids: Tensor | Sequence[int], axis: int, ndim: int) -> ScaleTerm:
    """A term that varies along one axis."""
    ids = torch.as_tensor(ids)
    shape = [1] * ndim
    shape[axis] = len(ids)
    return ScaleTerm(coefficient, ids.reshape(shape))


def make_plan(
    model: nn.Module,
    widths: Sequence[int],
    labels: Labels,
    depth: dict[str, int],
) -> Plan:
    """widths: channels of each group; labels: (coefficient, ids, axis) by parameter name."""
    starts = [sum(widths[:k]) for k in range(len(widths))]
    deepest = max(depth.values())
    parameters = []
    for name, parameter in model.named_parameters():
        layer = name.rsplit(".", 1)[0]
        parameters.append(
            ScaledParameter(
                name=name,
                shape=tuple(parameter.shape),
                terms=tuple(along(c, i, a, parameter.ndim) for c, i, a in labels.get(name, [])),
                counted=parameter.ndim > 1,
                depth=depth[layer],
                last=depth[layer] == deepest,
            )
        )
    groups = tuple(
        Group(width, (), (), (), start) for width, start in zip(widths, starts, strict=True)
    )
    return Plan(
        model=model,
        parameters=tuple(parameters),
        groups=groups,
        blocked=(),
        num_scales=sum(widths),
        exact=True,
        dataflow=nx.DiGraph(),
        shown=None,
        tracer="hand",
        inputs=((), {}),
    )


def ids(widths: Sequence[int], group: int) -> Tensor:
    """The scales of one group."""
    start = sum(widths[:group])
    return torch.arange(start, start + widths[group])


def fill_(model: nn.Module, seed: int) -> nn.Module:
    """Seeded weights of unequal size, float64; biases too."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            size = torch.rand((), generator=generator, dtype=torch.float64) * 3 - 1.5
            parameter.mul_(size.exp())
    return model


def _inputs(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chain(
    widths: Sequence[int],
    seed: int = 0,
    kind: str = "linear",
    bias: bool = True,
    kernels: Sequence[int] = (3, 1),
) -> Case:
    """Linear or convolution layers with ReLU between them. widths: input, hidden ..., output."""
    layers: dict[str, nn.Module] = {}
    for k, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        size = kernels[k % len(kernels)]
        layers[f"layer_{k:02d}"] = (
            nn.Linear(fan_in, fan_out, bias=bias)
            if kind == "linear"
            else nn.Conv2d(fan_in, fan_out, size, padding=size // 2, bias=bias)
        )
    names = list(layers)

    def run(net: Net, x: Tensor) -> Tensor:
        for name in names[:-1]:
            x = F.relu(net.get_submodule(name)(x))
        return net.get_submodule(names[-1])(x)

    model = fill_(Net(run, **layers), seed)
    hidden = widths[1:-1]
    labels: Labels = {}
    for k, name in enumerate(names):
        labels[f"{name}.weight"] = []
        if k < len(hidden):
            labels[f"{name}.weight"].append((1, ids(hidden, k), 0))
            labels[f"{name}.bias"] = [(1, ids(hidden, k), 0)]
        if k > 0:
            labels[f"{name}.weight"].append((-1, ids(hidden, k - 1), 1))
    plan = make_plan(model, hidden, labels, {name: k + 1 for k, name in enumerate(names)})
    shape = (2, widths[0]) if kind == "linear" else (2, widths[0], 4, 4)
    return Case(f"chain-{kind}", model, plan, _inputs(seed, *shape))


def residual(blocks: int = 2, width: int = 5, inner: int = 4, seed: int = 0) -> Case:
    """x + up(relu(down(x))): one stream scale with many producers and consumers."""
    layers: dict[str, nn.Module] = {"embed": nn.Linear(3, width)}
    for k in range(blocks):
        layers[f"down{k}"] = nn.Linear(width, inner)
        layers[f"up{k}"] = nn.Linear(inner, width)
    layers["head"] = nn.Linear(width, 2)

    def run(net: Net, x: Tensor) -> Tensor:
        x = net.embed(x)
        for k in range(blocks):
            down, up = net.get_submodule(f"down{k}"), net.get_submodule(f"up{k}")
            x = x + up(F.relu(down(x)))
        return net.head(F.relu(x))

    model = fill_(Net(run, **layers), seed)
    widths = [width] + [inner] * blocks
    stream = ids(widths, 0)
    labels: Labels = {
        "embed.weight": [(1, stream, 0)],
        "embed.bias": [(1, stream, 0)],
        "head.weight": [(-1, stream, 1)],
    }
    depth = {"embed": 1, "head": 2 * blocks + 2}
    for k in range(blocks):
        hidden = ids(widths, k + 1)
        labels[f"down{k}.weight"] = [(1, hidden, 0), (-1, stream, 1)]
        labels[f"down{k}.bias"] = [(1, hidden, 0)]
        labels[f"up{k}.weight"] = [(1, stream, 0), (-1, hidden, 1)]
        labels[f"up{k}.bias"] = [(1, stream, 0)]
        depth |= {f"down{k}": 2 * k + 2, f"up{k}": 2 * k + 3}
    return Case("residual", model, make_plan(model, widths, labels, depth), _inputs(seed, 4, 3))


def linear_residual(width: int = 5, seed: int = 0) -> Case:
    """head(x + mix(x)): both sides of `mix` in one group, its diagonal moved by nothing."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = net.embed(x)
        return net.head(x + net.mix(x))

    model = Net(
        run, embed=nn.Linear(3, width), mix=nn.Linear(width, width), head=nn.Linear(width, 2)
    )
    fill_(model, seed)
    return Case("linear-residual", model, _one_stream(model, width), _inputs(seed, 4, 3))


def _one_stream(model: nn.Module, width: int) -> Plan:
    stream = torch.arange(width)
    labels: Labels = {
        "embed.weight": [(1, stream, 0)],
        "embed.bias": [(1, stream, 0)],
        "mix.weight": [(1, stream, 0), (-1, stream, 1)],
        "mix.bias": [(1, stream, 0)],
        "head.weight": [(-1, stream, 1)],
    }
    return make_plan(model, [width], labels, {"embed": 1, "mix": 2, "head": 3})


def shared(width: int = 4, seed: int = 0) -> Case:
    """One weight used twice, which makes its input and its output one group."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.embed(x))
        for _ in range(2):
            x = F.relu(F.linear(x, net.mix.weight))
        return net.head(x)

    model = Net(
        run,
        embed=nn.Linear(3, width),
        mix=nn.Linear(width, width, bias=False),
        head=nn.Linear(width, 2),
    )
    fill_(model, seed)
    return Case("shared", model, _one_stream(model, width), _inputs(seed, 4, 3))


def grouped(groups: int = 2, seed: int = 0) -> Case:
    """A grouped convolution: its input scales vary along both axes (groups=4: depthwise)."""

    def run(net: Net, x: Tensor) -> Tensor:
        return net.last(F.relu(net.middle(F.relu(net.first(x)))))

    model = Net(
        run,
        first=nn.Conv2d(2, 4, 3, padding=1),
        middle=nn.Conv2d(4, 8, 3, padding=1, groups=groups),
        last=nn.Conv2d(8, 3, 1),
    )
    fill_(model, seed)
    widths = [4, 8]
    first, second = ids(widths, 0), ids(widths, 1)
    plan = make_plan(
        model,
        widths,
        {
            "first.weight": [(1, first, 0)],
            "first.bias": [(1, first, 0)],
            "middle.weight": [(1, second, 0)],
            "middle.bias": [(1, second, 0)],
            "last.weight": [(-1, second, 1)],
        },
        {"first": 1, "middle": 2, "last": 3},
    )
    inputs = first.view(groups, -1).repeat_interleave(8 // groups, 0)
    both = ScaleTerm(-1.0, inputs.reshape(8, 4 // groups, 1, 1))
    middle = replace(plan.parameters[2], terms=(*plan.parameters[2].terms, both))
    plan = replace(plan, parameters=(*plan.parameters[:2], middle, *plan.parameters[3:]))
    return Case(f"grouped-{groups}", model, plan, _inputs(seed, 2, 2, 4, 4))


def flattened(channels_last: bool = False, seed: int = 0) -> Case:
    """Convolution, flatten, linear: every scale is read by four inputs."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.features(x))
        return net.head((x.permute(0, 2, 3, 1) if channels_last else x).flatten(1))

    model = fill_(Net(run, features=nn.Conv2d(2, 5, 3, padding=1), head=nn.Linear(20, 3)), seed)
    channels = torch.arange(5)
    read = channels.repeat(4) if channels_last else channels.repeat_interleave(4)
    plan = make_plan(
        model,
        [5],
        {
            "features.weight": [(1, channels, 0)],
            "features.bias": [(1, channels, 0)],
            "head.weight": [(-1, read, 1)],
        },
        {"features": 1, "head": 2},
    )
    name = "flattened-last" if channels_last else "flattened"
    return Case(name, model, plan, _inputs(seed, 3, 2, 2, 2))


def joined(seed: int = 0) -> Case:
    """Two branches and the raw input side by side: two groups and pinned positions on one axis."""

    def run(net: Net, x: Tensor) -> Tensor:
        both = torch.cat([F.relu(net.left(x)), x, F.relu(net.right(x))], dim=1)
        return net.head(F.relu(net.middle(both)))

    model = Net(
        run,
        left=nn.Linear(3, 4),
        right=nn.Linear(3, 2),
        middle=nn.Linear(9, 5),
        head=nn.Linear(5, 2),
    )
    fill_(model, seed)
    widths = [4, 2, 5]
    left, right, middle = (ids(widths, k) for k in range(3))
    plan = make_plan(
        model,
        widths,
        {
            "left.weight": [(1, left, 0)],
            "left.bias": [(1, left, 0)],
            "right.weight": [(1, right, 0)],
            "right.bias": [(1, right, 0)],
            "middle.weight": [
                (1, middle, 0),
                (-1, torch.cat([left, torch.full((3,), -1), right]), 1),
            ],
            "middle.bias": [(1, middle, 0)],
            "head.weight": [(-1, middle, 1)],
        },
        {"left": 1, "right": 1, "middle": 2, "head": 3},
    )
    return Case("joined", model, plan, _inputs(seed, 4, 3))


def squared(direct: bool = False, seed: int = 0) -> Case:
    """head(relu(x)^2), coefficient 2; with `direct` also side(relu(x)): three coefficients."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.first(x))
        out = net.head(x**2)
        return out + net.side(x) if direct else out

    layers: dict[str, nn.Module] = {"first": nn.Linear(3, 5), "head": nn.Linear(5, 2)}
    labels: Labels = {
        "first.weight": [(1, range(5), 0)],
        "first.bias": [(1, range(5), 0)],
        "head.weight": [(-2, range(5), 1)],
    }
    if direct:
        layers["side"] = nn.Linear(5, 2)
        labels["side.weight"] = [(-1, range(5), 1)]
    model = fill_(Net(run, **layers), seed)
    plan = make_plan(model, [5], labels, {"first": 1, "head": 2, "side": 2})
    return Case("squared-direct" if direct else "squared", model, plan, _inputs(seed, 4, 3))


def gated(seed: int = 0) -> Case:
    """head(relu(gate) * value): the head takes minus both scales, three terms in the last."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.first(x))
        x = F.relu(net.gate(x)) * net.value(x)
        return net.head(F.relu(net.mixed(x)))

    model = Net(
        run,
        first=nn.Linear(3, 4),
        gate=nn.Linear(4, 5),
        value=nn.Linear(4, 5),
        mixed=nn.Linear(5, 6),
        head=nn.Linear(6, 2),
    )
    fill_(model, seed)
    widths = [4, 5, 5, 6]
    first, gate, value, mixed = (ids(widths, k) for k in range(4))
    plan = make_plan(
        model,
        widths,
        {
            "first.weight": [(1, first, 0)],
            "first.bias": [(1, first, 0)],
            "gate.weight": [(1, gate, 0), (-1, first, 1)],
            "gate.bias": [(1, gate, 0)],
            "value.weight": [(1, value, 0), (-1, first, 1)],
            "value.bias": [(1, value, 0)],
            "mixed.weight": [(1, mixed, 0), (-1, gate, 1), (-1, value, 1)],
            "mixed.bias": [(1, mixed, 0)],
            "head.weight": [(-1, mixed, 1)],
        },
        {"first": 1, "gate": 2, "value": 2, "mixed": 3, "head": 4},
    )
    return Case("gated", model, plan, _inputs(seed, 4, 3))


def all_cases(seed: int = 0) -> list[Case]:
    """One of every kind."""
    return [
        chain([3, 8, 7, 9, 2], seed),
        chain([3, 5, 4, 6, 2], seed, kind="conv"),
        residual(seed=seed),
        linear_residual(seed=seed),
        shared(seed=seed),
        grouped(2, seed),
        grouped(4, seed),
        flattened(False, seed),
        flattened(True, seed),
        joined(seed),
        squared(False, seed),
        squared(True, seed),
        gated(seed),
    ]
