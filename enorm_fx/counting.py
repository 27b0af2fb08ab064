"""How many rescalings a small model has, by numerical rank: an oracle that traces nothing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from enorm_fx.nested import replaced
from enorm_fx.symmetry.solution import connected
from enorm_fx.tracing.inputs import Call, as_call
from enorm_fx.tracing.outputs import outputs_of
from enorm_fx.verifying import double_copy


@dataclass(frozen=True, slots=True, eq=False)
class _Generators:
    """The candidate scales of one parameter.

    slices: for each kind of slice (output, input, ...) the generator of every entry, as an array
            that broadcasts against the parameter; numbers are local, from 0 to count - 1.
    """

    name: str
    slices: tuple[Tensor, ...]
    count: int

    def row(self, moved: Tensor) -> Tensor:
        """Sum of w * dF/dw over what each generator moves."""
        total = torch.zeros(self.count, dtype=moved.dtype)
        for index in self.slices:
            total.index_add_(0, index.expand(moved.shape).reshape(-1), moved.reshape(-1))
        return total

    def redundant(self, live: Tensor) -> int:
        """Dimension of the combinations of this parameter's generators that move no live entry."""
        entries = live.reshape(-1)
        columns = torch.stack([i.expand(live.shape).reshape(-1)[entries] for i in self.slices])
        if not columns.numel():
            return 0
        used = columns.unique()
        if len(columns) <= 2:  # r + 1, s - 1 on each connected part
            edges = [torch.stack([columns[0], other]) for other in columns[1:]]
            return len(connected(self.count, edges)[used].unique()) if edges else 0
        moved = torch.zeros(columns.shape[1], self.count, dtype=torch.float64)
        moved.scatter_add_(1, columns.T, torch.ones(columns.T.shape, dtype=moved.dtype))
        return len(used) - int(torch.linalg.matrix_rank(moved[:, used]))


def count_symmetries(model: nn.Module, example_inputs: Any, *, seed: int = 0) -> int:
    """The number of rescaling symmetries that a model has, by numerical rank.

    An oracle for tests of small models: it traces nothing and knows no rule. Every weight has a
    generator per line of entries along one of its axes, so a matrix one per row and one per column
    (the packed projection of attention one per column of each third; a convolution one per output
    and, in each group, per input), every other parameter one per entry. For random parameters,
    inputs and output cotangents a row holds, per generator, the sum of w * dF/dw over the weights
    that it moves; what a symmetry combines vanishes in every row. Buffers are not rescaled, so
    compare with `analyze(model, ..., batchnorm="affine", frozen="rescale")` in evaluation mode.

    Args:
        model: a small model (its generators squared must fit in memory).
        example_inputs: as for `analyze`; only shapes, types and the range of integers matter.
        seed: of the random draws; the caller's RNG is left alone.

    Returns:
        generators - rank - redundant combinations within a weight - generators of entries that
        reach no output.
    """
    model = double_copy(model)
    random = torch.Generator().manual_seed(seed)
    _draw_statistics(model, random)
    generators = _generators(model)
    total = sum(g.count for g in generators)
    rows = []
    live = {g.name: torch.zeros(0) for g in generators}
    for _ in range(total + 8):
        moved = _sensitivity(model, as_call(example_inputs), random)
        rows.append(torch.cat([g.row(moved[g.name]) for g in generators]))
        for name, m in moved.items():
            live[name] = live[name] + m.abs() if live[name].numel() else m.abs()
    matrix = torch.stack(rows)
    matrix = matrix / matrix.abs().amax(dim=1, keepdim=True).clamp_min(1e-300)
    size = matrix.abs().amax(dim=0)
    effective = size > 1e-12  # a symmetry by itself has no effect either, and counts
    strongest = max((float(m.max()) for m in live.values() if m.numel()), default=0.0)
    seen = {name: m > 1e-12 * strongest for name, m in live.items()}
    alive = torch.cat([g.row(seen[g.name].double()) for g in generators]) > 0
    values = torch.linalg.svdvals(matrix[:, effective] / size[effective])
    rank = int((values > 1e-10 * values.max()).sum()) if len(values) else 0
    redundant = sum(g.redundant(seen[g.name]) for g in generators)
    return int(alive.sum()) - rank - redundant


def _draw_statistics(model: nn.Module, random: torch.Generator) -> None:
    """Running statistics as of a trained model: means of exactly zero would add symmetries."""
    for module in model.modules():
        mean, variance = (getattr(module, f"running_{x}", None) for x in ("mean", "var"))
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            mean.copy_(torch.randn(mean.shape, dtype=torch.float64, generator=random))
            variance.copy_(0.5 + torch.rand(mean.shape, dtype=torch.float64, generator=random))


def _generators(model: nn.Module) -> list[_Generators]:
    convolutions: dict[int, nn.modules.conv._ConvNd] = {}
    packed = set()
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            convolutions[id(module.weight)] = module
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            packed.add(id(module.in_proj_weight))
    return [
        _slices(name, parameter, convolutions.get(id(parameter)), id(parameter) in packed)
        for name, parameter in model.named_parameters()
    ]


def _slices(
    name: str, parameter: Tensor, conv: nn.modules.conv._ConvNd | None, packed: bool
) -> _Generators:
    shape = parameter.shape
    if len(shape) < 2:
        return _Generators(name, (torch.arange(shape.numel()).reshape(shape),), shape.numel())
    if packed:  # three weights, one upon the other
        rows, columns = shape
        third = torch.arange(rows).unsqueeze(1) // (rows // 3)
        inner = rows + third * columns + torch.arange(columns)
        return _Generators(name, (torch.arange(rows).unsqueeze(1), inner), rows + 3 * columns)
    if conv is None:
        arrays, count = [], 0
        longer = [a for a, n in enumerate(shape) if n > 1]
        for axes in itertools.combinations(longer, max(1, len(longer) - 1) if longer else 0):
            view = [n if a in axes else 1 for a, n in enumerate(shape)]
            size = torch.Size(view).numel()
            arrays.append(torch.arange(count, count + size).reshape(view))
            count += size
        return _Generators(name, tuple(arrays), count)
    # Axis 0 of a convolution is split into groups, axis 1 is counted anew in each of them.
    group = torch.arange(shape[0]) // (shape[0] // conv.groups)
    first = torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    second = group.unsqueeze(1) * shape[1] + torch.arange(shape[1]) + shape[0]
    second = second.reshape(*shape[:2], *[1] * (len(shape) - 2))
    return _Generators(name, (first, second), shape[0] + conv.groups * shape[1])


def _sensitivity(model: nn.Module, call: Call, random: torch.Generator) -> dict[str, Tensor]:
    """w * dF/dw for random parameters, inputs and cotangents."""

    def draw(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, dtype=torch.float64, generator=random)
        if tensor.dtype is torch.bool or not tensor.numel():
            return tensor
        low, high = int(tensor.min()), int(tensor.max()) + 1
        return torch.randint(low, high, tensor.shape, generator=random).to(tensor.dtype)

    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(draw(parameter) * (2 / fan_in) ** 0.5)
            parameter.requires_grad_(True)
    args, kwargs = replaced(Tensor, call, draw)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = model(*args, **kwargs)
        outputs = [y for y in outputs_of(result, (args, kwargs)) if y.requires_grad]
        total = torch.stack([(y * draw(y)).sum() for y in outputs]).sum()
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else (p * g).detach()
        for name, p, g in zip(names, parameters, gradients, strict=True)
    }
