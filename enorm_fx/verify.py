"""Check a plan numerically, on a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from enorm_fx.errors import ArgumentError
from enorm_fx.plan import Plan
from enorm_fx.solve import connected
from enorm_fx.tracing.inputs import Call, as_call
from enorm_fx.tracing.leaves import map_tensors, tensors_in
from enorm_fx.tracing.state import FOREIGN

_SPREAD = 0.3  # standard deviation of the random log scales


@dataclass(frozen=True, slots=True)
class Verification:
    """What random rescalings did to the outputs.

    largest_change: max |y' - y| / max |y| over all outputs and trials (dimensionless).
    trials:         how many random rescalings were tried.
    exact:          what the plan claims: with an exact plan the change is rounding alone.
    """

    largest_change: float
    trials: int
    exact: bool


def verify(plan: Plan, example_inputs: Any = None, *, trials: int = 3) -> Verification:
    """Rescale a float64 copy of the model at random and measure how much its outputs change.

    The model itself, its mode and the RNG are left alone. Without example inputs, random ones of
    the shapes that the analysis used are drawn.

    Args:
        plan: what `analyze` returned.
        example_inputs: as for `analyze`; floating-point tensors are used in float64.
        trials: number of random rescalings, log scales drawn from N(0, 0.3).

    Raises:
        ArgumentError: trials < 1, or the outputs are not finite before any rescaling.
    """
    if trials < 1:
        raise ArgumentError(f"trials must be at least 1, not {trials}")
    model = double_copy(plan.model)
    generator = torch.Generator().manual_seed(0)
    _fill_zeros(model, generator)
    call = plan.inputs if example_inputs is None else as_call(example_inputs)
    args, kwargs = _in_double(call, generator, draw=example_inputs is None)
    before = _outputs(model, args, kwargs)
    if not all(bool(y.isfinite().all()) for y in before):
        raise ArgumentError("the model's outputs are not finite: verify with other inputs")
    if not any(y.numel() for y in before):
        raise ArgumentError("the model's outputs have no entries: verify with other inputs")
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}
    on_copy = replace(plan, model=model)
    largest = 0.0
    for _ in range(trials):
        u = _SPREAD * torch.randn(plan.num_scales, dtype=torch.float64, generator=generator)
        on_copy.rescale_(u)
        largest = max(largest, relative_change(before, _outputs(model, args, kwargs)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(saved[name])
    return Verification(largest, trials, plan.exact)


def double_copy(model: nn.Module) -> nn.Module:
    """A copy in float64 and in the same mode, which shares nothing with the model."""
    return copy.deepcopy(model).double()


def _fill_zeros(model: nn.Module, generator: torch.Generator) -> None:
    """Parameters that are zero everywhere hide what comes before them; the plan holds for any."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not bool(parameter.any()):
                noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
                parameter.copy_(0.1 * noise)


def relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    """max |after - before| / max |before|, the largest over all outputs; inf where not finite."""
    largest = 0.0
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape or not bool(new.isfinite().all()):
            return float("inf")
        if old.numel():
            change = (new - old).abs().max().item()
            size = old.abs().max().item()
            largest = max(largest, change / size if size else (float("inf") if change else 0.0))
    return largest


def _in_double(call: Call, generator: torch.Generator, draw: bool) -> Call:
    def convert(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if draw:
            values = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
            return values.to(tensor.device)
        return tensor.detach().double()

    return map_tensors(call, convert)  # type: ignore[no-any-return]


def _outputs(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    """The floating-point outputs of one run; the same dropout masks every time."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _double_by_default():
        torch.manual_seed(0)
        try:
            outputs = model(*args, **kwargs)
        except FOREIGN as error:
            raise ArgumentError(
                f"the float64 copy of the model raised {type(error).__name__}: {error}"
            ) from error
        return [t for t in tensors_in(outputs) if t.is_floating_point()]


@contextmanager
def _double_by_default() -> Iterator[None]:
    """Tensors that the model makes as it runs are float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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

    def blocks(self, live: Tensor) -> int:
        """Dimension of the combinations of this parameter's generators that move no live entry."""
        entries = live.reshape(-1)
        columns = [i.expand(live.shape).reshape(-1)[entries] for i in self.slices]
        if not columns or not len(columns[0]):
            return 0
        used = torch.cat(columns).unique()
        edges = [torch.stack([columns[0], other]) for other in columns[1:]]
        if not edges:
            return 0
        components = len(connected(self.count, edges)[used].unique())
        return components * (len(columns) - 1)


def count_symmetries(model: nn.Module, example_inputs: Any, *, seed: int = 0) -> int:
    """The number of rescaling symmetries that a model has, by numerical rank.

    An oracle for tests of small models: it traces nothing and knows no rule. Every weight of two
    or more axes has a generator per output slice and per input slice (per group for grouped
    convolutions), every other parameter one per entry. For random parameters, inputs and output
    cotangents a row holds, per generator, the sum of w * dF/dw over the weights that it moves;
    what a symmetry combines vanishes in every row. Buffers are not rescaled, so compare with
    `analyze(model, ..., batchnorm="affine", frozen="rescale")` in evaluation mode.

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
    redundant = sum(g.blocks(seen[g.name]) for g in generators)
    return int(alive.sum()) - rank - redundant


def _draw_statistics(model: nn.Module, random: torch.Generator) -> None:
    """Running statistics as of a trained model: means of exactly zero would add symmetries."""
    for module in model.modules():
        mean, variance = (getattr(module, f"running_{x}", None) for x in ("mean", "var"))
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            mean.copy_(torch.randn(mean.shape, dtype=torch.float64, generator=random))
            variance.copy_(0.5 + torch.rand(mean.shape, dtype=torch.float64, generator=random))


def _generators(model: nn.Module) -> list[_Generators]:
    convolutions = {
        id(m.weight): m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)
    }
    return [
        _slices(name, parameter, convolutions.get(id(parameter)))
        for name, parameter in model.named_parameters()
    ]


def _slices(name: str, parameter: Tensor, conv: nn.modules.conv._ConvNd | None) -> _Generators:
    shape = parameter.shape
    if len(shape) < 2:
        return _Generators(name, (torch.arange(shape.numel()).reshape(shape),), shape.numel())
    if conv is None:
        arrays, count = [], 0
        for axis, size in enumerate(shape):
            if size > 1:
                view = [1] * len(shape)
                view[axis] = size
                arrays.append(torch.arange(count, count + size).reshape(view))
                count += size
        if not arrays:
            arrays, count = [torch.zeros([1] * len(shape), dtype=torch.int64)], 1
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
    args, kwargs = map_tensors(call, draw)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = [y for y in tensors_in(model(*args, **kwargs)) if y.requires_grad]
        total = torch.stack([(y * draw(y)).sum() for y in outputs]).sum()
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else (p * g).detach()
        for name, p, g in zip(names, parameters, gradients, strict=True)
    }
