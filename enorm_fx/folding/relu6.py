"""`replace_relu6_`: ReLU instead of ReLU6, which changes the function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from enorm_fx.errors import ArgumentError
from enorm_fx.folding.batchnorm import LeftAlone
from enorm_fx.folding.proof import changes_of_forward
from enorm_fx.tracing import Node, trace
from enorm_fx.verifying import double_copy, in_double, outputs_in_double, relative_change


@dataclass(frozen=True, slots=True)
class ReplacedReLU6:
    """What `replace_relu6_` did.

    replaced: paths of the modules that are nn.ReLU now.
    left:     what clamps to 6 still: modules, and modules that call a function that does.
    change:   max |y' - y| / max |y| over all outputs, float64, on the inputs that were given.
    """

    replaced: tuple[str, ...]
    left: tuple[LeftAlone, ...]
    change: float

    def __str__(self) -> str:
        lines = [
            f"THE FUNCTION IS ANOTHER ONE: {len(self.replaced)} ReLU6 are ReLU, which changes the "
            f"outputs by a relative {self.change:.1e} on these inputs, {len(self.left)} left alone"
        ]
        lines += [f"  {entry.module} left alone: {entry.reason}" for entry in self.left]
        return "\n".join(lines)


def replace_relu6_(model: nn.Module, example_inputs: Any = None) -> ReplacedReLU6:
    """Put nn.ReLU in the place of every nn.ReLU6, in place. THIS CHANGES THE FUNCTION.

    Values above 6 pass where they were cut off. What is after it can be equalized through, as
    min(x, 6) cannot; whether the model is still as accurate is for its owner to measure. The
    report has the change of the outputs on the example inputs: give real ones, as random ones
    may never reach 6.

    nn.Hardtanh(0, 6) counts as ReLU6; functions (F.relu6, clamp) stay and are reported.

    example_inputs: as for `analyze`; None: normally distributed, of the shapes that it finds.

    Raises ArgumentError or TraceError, with nothing changed.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ArgumentError("the model is on the meta device and gives no outputs to compare")
    traced = trace(model, example_inputs)
    left = [
        LeftAlone(path, f"it has {changes_of_forward(module)}")
        for path, module in model.named_modules(remove_duplicate=False)
        if _is_relu6(module) and changes_of_forward(module)
    ]
    known = {path for path, module in model.named_modules() if path and _is_relu6(module)}
    for node in traced.nodes:
        if _clamps_to_6(node) and node.module not in known:
            place = f" at {node.source}" if node.source else ""
            entry = LeftAlone(node.module, f"it calls '{node.op}'{place}")
            left += [entry] if entry not in left else []
    changed = double_copy(model)
    generator = torch.Generator().manual_seed(0)
    args, kwargs = in_double(traced.inputs, generator, draw=example_inputs is None)
    before = outputs_in_double(changed, args, kwargs)
    _replace_(changed)
    change = relative_change(before, outputs_in_double(changed, args, kwargs))
    return ReplacedReLU6(_replace_(model), tuple(left), change)


def _replace_(model: nn.Module) -> tuple[str, ...]:
    """The paths of what was replaced; a module of two names stays one."""
    made: dict[int, nn.Module] = {}
    replaced = []
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path and _is_relu6(module) and not changes_of_forward(module):
            relu = made.setdefault(id(module), nn.ReLU(bool(module.inplace)).train(module.training))
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, relu)
            replaced.append(path)
    return tuple(replaced)


def _is_relu6(module: nn.Module) -> bool:
    if type(module) is nn.ReLU6:
        return True
    return type(module) is nn.Hardtanh and (module.min_val, module.max_val) == (0, 6)


def _clamps_to_6(node: Node) -> bool:
    if node.op == "relu6":
        return True
    bounds = [*node.args[1:3], node.kwargs.get("max"), node.kwargs.get("max_val")]
    return node.op in ("hardtanh", "clamp", "clamp_max") and 6 in [
        bound for bound in bounds if isinstance(bound, int | float)
    ]
