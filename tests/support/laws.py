"""What the library claims, checked by numbers alone.

Two laws. For one op: scale its inputs by exp(label) and its output scales by exp(its label). For
a model: rescale its weights and its outputs stay. And two counts to hold against what was found:
the numerical dimension of all scalings that an op admits, and of all that a model admits, entry
by entry of every parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from enorm_fx.model_plan import Plan
from enorm_fx.nested import replaced, tensors_anywhere
from enorm_fx.rules import Labels, propagate
from enorm_fx.symmetry.labels import Label
from enorm_fx.symmetry.solution import ScaleTerm, Solution, solve
from enorm_fx.tracing import Trace, trace
from enorm_fx.tracing.trace import INPUT, Node

SPREAD = 0.3  # standard deviation of random log scales
ROUNDING = 1e-9  # relative; what float64 may leave of an exact law


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Any) -> Any:
        return self.run(*args)


def as_module(run: Callable[..., Any]) -> nn.Module:
    """The module itself in float64, or a module around a function."""
    return run.double() if isinstance(run, nn.Module) else Call(run)


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def run_again(module: nn.Module, inputs: Any) -> list[Tensor]:
    """Outputs of one call on copies of the inputs; the same random numbers in every call."""
    torch.default_generator.manual_seed(0)
    args = replaced(Tensor, inputs, torch.clone)
    with torch.no_grad():
        return [t.clone() for t in tensors_anywhere(module(*args))]


def deviation(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest entry; inf where kinds or NaNs differ."""
    largest = 0.0
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        differs = (a != b) & ~a.isnan()
        if not bool(differs.any()):
            continue
        if not a.is_floating_point():
            return float("inf")
        size = max(x[x.isfinite()].abs().max().item() for x in (a, b))
        largest = max(largest, (a[differs] - b[differs]).abs().max().item() / size)
    return largest


# --- one op ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """One op with free inputs and outputs, its labels solved."""

    module: nn.Module
    inputs: tuple[Any, ...]
    trace: Trace
    labels: Labels
    solution: Solution

    @property
    def ops(self) -> set[str]:
        """The keys of the ops that ran."""
        return {node.op for node in self.trace.nodes}

    def input_labels(self) -> list[Label]:
        """Labels of the floating-point inputs, in the order of the arguments."""
        nodes = sorted((n for n in self.trace.nodes if n.op == INPUT), key=_position)
        return [self.labels.values[n.index] for n in nodes]

    def output_labels(self) -> list[Label]:
        found = []
        for node, _ in self.trace.outputs:
            label = self.labels.values[node.index]
            found.append(self.labels.parameters.get(node.name, label))
        return found

    def parameter_labels(self) -> dict[str, Label]:
        return self.labels.parameters


def record(run: Callable[..., Any], inputs: tuple[Any, ...]) -> Recorded:
    """Trace an op on its inputs, label it and solve, all inputs and outputs left free."""
    module = as_module(run)
    flat = tuple(tensors_anywhere(inputs))
    wrapped = _Flat(module, inputs)
    traced = trace(wrapped, {f"input_{i}": x for i, x in enumerate(flat)}, "symbolic")
    labels = propagate(traced, free=True, batchnorm="affine")
    return Recorded(wrapped, flat, traced, labels, solve(labels.system))


class _Flat(nn.Module):
    """A module called with every tensor of its (nested) inputs as an argument of its own."""

    def __init__(self, module: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.module = module
        self.inputs = inputs

    def forward(self, *flat: Tensor, **named: Tensor) -> Any:
        items = iter((*flat, *named.values()))
        return self.module(*replaced(Tensor, self.inputs, lambda _: next(items)))


def log_scale(terms: Sequence[ScaleTerm], shape: Sequence[int], u: Tensor) -> Tensor:
    """Sum of coefficient * u[index] over the terms, -1 standing for zero, in full shape."""
    padded = torch.cat([u, u.new_zeros(1)])
    total = torch.zeros(tuple(shape), dtype=u.dtype)
    for term in terms:
        total = total + term.coefficient * padded[term.index]
    return total


def scaled(recorded: Recorded, label: Label, tensor: Tensor, u: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    terms = recorded.solution.terms(label.terms)
    return (tensor * log_scale(terms, label.shape, u).exp()).to(tensor.dtype)


def law_deviation(recorded: Recorded, trials: int = 3) -> float:
    """How far the op is from scaling as its labels say, over random solutions."""
    generator = torch.Generator().manual_seed(1)
    before = run_again(recorded.module, recorded.inputs)
    assert len(before) == len(recorded.trace.outputs)
    worst = 0.0
    for _ in range(trials):
        size = recorded.labels.system.size
        u = SPREAD * torch.randn(size, dtype=torch.float64, generator=generator)
        count = len(recorded.inputs)
        labels = recorded.input_labels() if count else []
        by_position = dict(zip(_positions(recorded.trace), labels, strict=True))
        inputs = tuple(
            scaled(recorded, by_position[i], x, u) if i in by_position else x
            for i, x in enumerate(recorded.inputs)
        )
        module = copy.deepcopy(recorded.module)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in recorded.parameter_labels():
                    label = recorded.parameter_labels()[name]
                    parameter.copy_(scaled(recorded, label, parameter, u))
        expected = [
            scaled(recorded, label, y, u)
            for label, y in zip(recorded.output_labels(), before, strict=True)
        ]
        worst = max(worst, deviation(run_again(module, inputs), expected))
    return worst


def _positions(traced: Trace) -> list[int]:
    """Which arguments reach an output."""
    return sorted(_position(n) for n in traced.nodes if n.op == INPUT)


def _position(node: Node) -> int:
    return int(node.name.strip("'").rpartition("_")[2])


def redrawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Other numbers in the same place; positive ones stay positive, integers as they are."""
    if not tensor.is_floating_point():
        return tensor
    drawn = torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
    return drawn.abs() + 0.1 if bool((tensor > 0).all()) else drawn


def found_scales(recorded: Recorded) -> int:
    """The dimension of the solutions, seen in the exponents of inputs, parameters and outputs.

    Entries of the output that are always zero are left out: any scale will do for them.
    """
    labels = _input_labels_used(recorded) + list(recorded.parameter_labels().values())
    floating = [
        label
        for label, y in zip(recorded.output_labels(), _run(recorded), strict=True)
        if is_floating(y)
    ]
    rows = [_matrix(recorded, label) for label in (*labels, *floating)]
    inner = sum(len(r) for r in rows[: len(labels)])
    found = torch.cat(rows)
    keep = torch.cat([torch.ones(inner, dtype=torch.bool), ~_always_zero(recorded)])
    return int(torch.linalg.matrix_rank(found[keep])) if found[keep].numel() else 0


def admitted_scales(recorded: Recorded) -> int:
    """The numerical dimension of all scalings of an op, entry by entry.

    A scaling gives every entry of every input and parameter an exponent a and every entry of the
    output one, b, such that (df/dlog x) a = f * b at random points; derivatives are central
    differences.
    """
    generator = torch.Generator().manual_seed(2)
    module = copy.deepcopy(recorded.module)
    parameters = dict(module.named_parameters())
    names = list(recorded.parameter_labels())
    keep = ~_always_zero(recorded)
    rows: list[Tensor] = []
    wanted, draws = 1, 0
    while draws < 16 or len(rows) * len(keep) < wanted:
        draws += 1
        inputs = _drawn(recorded, module, generator)
        leaves = [inputs[i] for i in _floating_positions(recorded)]
        leaves += [parameters[name].data for name in names]
        outputs = _numbers(run_again(module, tuple(inputs)))
        columns = [c for leaf in leaves for c in _log_derivatives(module, inputs, leaf)]
        jacobian = torch.stack(columns, dim=1) if columns else outputs.new_zeros(len(outputs), 0)
        rows.append(torch.cat([jacobian, -torch.diag(outputs)[:, keep]], dim=1))
        wanted = 12 * rows[0].shape[1] if len(keep) else 0
    matrix = torch.cat(rows)
    return matrix.shape[1] - clear_rank(matrix, 1e-6)


def _floating_positions(recorded: Recorded) -> list[int]:
    """Which arguments reach an output and are floating point."""
    return [i for i in _positions(recorded.trace) if is_floating(recorded.inputs[i])]


def _input_labels_used(recorded: Recorded) -> list[Label]:
    by_position = dict(zip(_positions(recorded.trace), recorded.input_labels(), strict=True))
    return [by_position[i] for i in _floating_positions(recorded)]


def _run(recorded: Recorded) -> list[Tensor]:
    return run_again(recorded.module, recorded.inputs)


def _drawn(recorded: Recorded, module: nn.Module, generator: torch.Generator) -> list[Tensor]:
    """Other inputs, and other parameters written into the module."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name in recorded.parameter_labels():
            parameters[name].copy_(redrawn(parameters[name], generator))
    return [redrawn(t, generator) for t in recorded.inputs]


def _always_zero(recorded: Recorded, draws: int = 32) -> Tensor:
    """Which of the output's entries are zero whatever the inputs."""
    generator = torch.Generator().manual_seed(4)
    module = copy.deepcopy(recorded.module)
    runs = [
        _numbers(run_again(module, tuple(_drawn(recorded, module, generator))))
        for _ in range(draws)
    ]
    return torch.stack(runs).abs().amax(0) == 0


def _numbers(outputs: list[Tensor]) -> Tensor:
    floating = [y.reshape(-1) for y in outputs if y.is_floating_point()]
    return torch.cat(floating) if floating else torch.zeros(0, dtype=torch.float64)


def _log_derivatives(module: nn.Module, inputs: list[Tensor], leaf: Tensor) -> list[Tensor]:
    step = 1e-5
    columns = []
    flat = leaf.view(-1)
    for e in range(flat.numel()):
        value = flat[e].item()
        sides = []
        for sign in (1, -1):
            flat[e] = value * (1 + sign * step)
            sides.append(_numbers(run_again(module, tuple(inputs))))
        flat[e] = value
        columns.append((sides[0] - sides[1]) / (2 * step))
    return columns


def _matrix(recorded: Recorded, label: Label) -> Tensor:
    """Rows of exponents of a label's entries, one column per variable."""
    count = torch.Size(label.shape).numel()
    result = torch.zeros(count, recorded.labels.system.size + 1, dtype=torch.float64)
    for term in recorded.solution.terms(label.terms):
        index = term.index.expand(label.shape).reshape(-1)
        result[torch.arange(count), index] += term.coefficient
    return result[:, :-1]


def clear_rank(matrix: Tensor, tolerance: float) -> int:
    """The numerical rank, columns normalized; an error where the singular values leave doubt."""
    norms = matrix.norm(dim=0)
    matrix = matrix / torch.where(norms > tolerance * norms.max().clamp_min(1e-30), norms, 1e30)
    values = torch.linalg.svdvals(matrix)
    if not len(values) or values[0] == 0:
        return 0
    rank = int((values > tolerance * values[0]).sum())
    if rank < len(values):
        assert values[rank] < 1e-2 * values[rank - 1], "no gap between the singular values"
    return rank


# --- a model -----------------------------------------------------------------------------------


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters and running statistics, all of order one; float64, in evaluation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.double().eval()


def largest_change(plan: Plan, inputs: Any, trials: int = 2, spread: float = SPREAD) -> float:
    """Relative change of the outputs under random rescalings, not using the library's own code."""
    generator = torch.Generator().manual_seed(3)
    before = run_again(plan.model, inputs)
    worst = 0.0
    for _ in range(trials):
        u = spread * torch.randn(plan.num_scales, dtype=torch.float64, generator=generator)
        after = run_again(with_scales(plan, u), inputs)
        worst = max(worst, deviation(after, before))
    return worst


def with_scales(plan: Plan, u: Tensor) -> nn.Module:
    """A copy of the plan's model, rescaled by u."""
    model = copy.deepcopy(plan.model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for entry in plan.parameters:
            factor = log_scale(entry.terms, entry.shape, u).exp()
            parameters[entry.name].mul_(factor.to(parameters[entry.name].dtype))
    return model


def count_symmetries(model: nn.Module, inputs: Any, seed: int = 0) -> int:
    """The dimension of all w_e -> w_e exp(a_e) that keep a model's function, entry by entry.

    Rows w * dF/dw at random parameters, inputs and cotangents; entries that reach no output
    scale at will and are not counted.
    """
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).double()
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    wanted = 2 * total + 60  # many: a unit that is off at some point says nothing there
    rows: list[Tensor] = []
    while len(rows) < wanted:
        with torch.no_grad():
            for p in parameters:
                fan_in = max(1, p[0].numel()) if p.ndim > 1 else 1
                p.copy_(torch.randn(p.shape, dtype=p.dtype, generator=generator) / fan_in**0.5)
        args = replaced(Tensor, inputs, lambda t: redrawn(t, generator))
        outputs = [y for y in tensors_anywhere(model(*args)) if y.is_floating_point()]
        for _ in range(min(8, sum(y.numel() for y in outputs))):  # no more are independent
            loss = sum(
                (y * torch.randn(y.shape, dtype=y.dtype, generator=generator)).sum()
                for y in outputs
            )
            gradients = torch.autograd.grad(
                loss, parameters, retain_graph=True, materialize_grads=True
            )
            row = torch.cat(
                [(p * g).reshape(-1) for p, g in zip(parameters, gradients, strict=True)]
            )
            rows.append(row.detach())
    matrix = torch.stack(rows)
    norms = matrix.norm(dim=0)
    alive = norms > 1e-12 * norms.max()
    return int(alive.sum()) - clear_rank(matrix[:, alive], 1e-9)
