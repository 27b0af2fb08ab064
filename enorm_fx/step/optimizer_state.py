"""Which optimizer buffer takes which power when the weights are rescaled.

If a weight w becomes a * w and the network keeps its function, every gradient g becomes g / a.
A buffer must become what it would be, had the rescaled network been trained from the start:

    linear in gradients (momentum of SGD, exp_avg)             a^-1
    quadratic in gradients (exp_avg_sq, square_avg, sum)       a^-2
    gradients divided by their own size (RMSprop's momentum)   a^0
    weights or their updates (ax, Rprop's step_size)           a^1
    squared updates (acc_delta)                                a^2

Where a second moment is kept as means of rows and of columns, as Adafactor does, it is their
product that takes the power: see `FactoredMoments`.

Nothing here writes: `state_buffers` says what is to be multiplied by what.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from enorm_fx.errors import ArgumentError, OptimizerStateError
from enorm_fx.step.shards import is_sharded

# By the name of the class in torch.optim; a class that this torch does not have is passed over.
EXPONENTS: Mapping[str, Mapping[str, int]] = {
    "SGD": {"momentum_buffer": -1},
    "Adam": {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2},
    "AdamW": {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2},
    "SparseAdam": {"exp_avg": -1, "exp_avg_sq": -2},
    "NAdam": {"exp_avg": -1, "exp_avg_sq": -2},
    "RAdam": {"exp_avg": -1, "exp_avg_sq": -2},
    "Adamax": {"exp_avg": -1, "exp_inf": -1},
    # Its momentum adds up g / sqrt(square_avg), which no rescaling changes.
    "RMSprop": {"square_avg": -2, "grad_avg": -1, "momentum_buffer": 0},
    "Adagrad": {"sum": -2},
    # acc_delta averages squared updates: these are as large as the weights, not as gradients.
    "Adadelta": {"square_avg": -2, "acc_delta": 2},
    "ASGD": {"ax": 1},
    # Only the sign of prev is used; step_size is the update itself.
    "Rprop": {"prev": -1, "step_size": 1},
    "Muon": {"momentum_buffer": -1},
    "Adafactor": {"variance": -2, "row_var * col_var": -2},
}
_registered: WeakKeyDictionary[type[Optimizer], dict[str, int]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """A tensor of optimizer state, and the power of the weight's factor that it takes."""

    name: str
    tensor: Tensor
    exponent: int


@dataclass(frozen=True, slots=True, eq=False)
class FactoredMoments:
    """Means of rows (..., n, 1) and of columns (..., 1, m) of a moment of a weight (..., n, m).

    The optimizer takes rows * columns / mean(rows) for the moment, and that takes the power.
    """

    name: str
    rows: Tensor
    columns: Tensor
    exponent: int


def register_optimizer_state(cls: type[Optimizer], buffers: Mapping[str, int]) -> None:
    """Say which power of the weight's factor each buffer of an optimizer class takes.

    cls: the class, of another package or your own; its subclasses have these buffers too.
    buffers: {"exp_avg": -1}: -1 linear in gradients, -2 quadratic, 1 as the weight, 0 stays.
             {"rows * columns": -2}: means of rows and of columns, which stand for
             rows * columns / mean(rows), as in Adafactor.
    Call it before `ENorm` is made. The same again changes nothing.

    Raises ArgumentError, with nothing registered, for what is no class of optimizer, a class of
    torch.optim, names or powers that are none, and a class that is registered otherwise.
    """
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise ArgumentError(f"cls must be a subclass of torch.optim.Optimizer, not {cls!r}")
    if cls is Optimizer or getattr(torch.optim, cls.__name__, None) is cls:
        raise ArgumentError(
            f"torch.optim.{cls.__name__} cannot be registered; derive a class, or pass "
            "buffers= to ENorm"
        )
    if not isinstance(buffers, Mapping) or not buffers:
        raise ArgumentError(f"buffers must be a dict such as {{'exp_avg': -1}}, not {buffers!r}")
    for name, power in buffers.items():
        if not isinstance(name, str) or not name or not 1 <= len(_members(name)) <= 2:
            raise ArgumentError(
                f"a buffer's name must be a string, or 'rows * columns' of two, not {name!r}"
            )
        if not isinstance(power, int) or isinstance(power, bool):
            raise ArgumentError(f"the power of buffer {name!r} must be an integer, not {power!r}")
    before = _registered.get(cls)
    if before is not None and before != dict(buffers):
        raise ArgumentError(
            f"{cls.__name__} is registered with {before}; pass buffers= to ENorm for another power"
        )
    _registered[cls] = dict(buffers)


def exponents(optimizer: Optimizer, buffers: Mapping[str, int] | None = None) -> dict[str, int]:
    """Buffer names of this optimizer and the power of the factor that each takes.

    A subclass has the buffers of the classes that it derives from. `buffers` adds names, and
    goes before the table: `{"my_average": -1}`; 0 leaves a buffer as it is. The name
    "row_var * col_var" is that of two buffers, see `register_optimizer_state`.
    """
    known: dict[str, int] = {}
    for cls in reversed(type(optimizer).__mro__):
        if getattr(torch.optim, cls.__name__, None) is cls:
            known.update(EXPONENTS.get(cls.__name__, {}))
        known.update(_registered.get(cls, {}))
    known.update(buffers or {})
    return known


def state_buffers(
    optimizer: Optimizer,
    parameter: Tensor,
    name: str,
    known: Mapping[str, int],
) -> tuple[Buffer | FactoredMoments, ...]:
    """The state tensors of `parameter` that change with its scale.

    known: what `exponents` gave. name: the parameter's, for messages. State that does not exist
    yet, None, numbers and one-element counters need nothing.

    Raises OptimizerStateError for a tensor that `known` does not name, or of another shape.
    """
    _refuse_joint_state(optimizer)
    state = optimizer.state.get(parameter, {})
    pairs = {key: names for key in known if len(names := _members(key)) == 2}
    paired = {member for names in pairs.values() for member in names} - known.keys()
    found: list[Buffer | FactoredMoments] = []
    for key, value in state.items():
        if key in known and not known[key]:
            continue
        for tensor in _tensors(value):
            if tensor.numel() > 1 and _is_quantized(tensor):
                raise _quantized(optimizer, key, tensor, name)
        if key in paired:
            continue
        if key in known:
            if not isinstance(value, Tensor):
                continue
            if value.shape != parameter.shape:
                raise _unknown(optimizer, key, value, name)
            found.append(Buffer(key, value, known[key]))
            continue
        for tensor in _tensors(value):
            if tensor.numel() > 1 or tensor.shape == parameter.shape:
                raise _unknown(optimizer, key, tensor, name)
    for key, members in pairs.items():
        both = [state.get(member) for member in members if member in paired]
        if known[key] and any(isinstance(value, Tensor) for value in both):
            rows, columns = _rows_and_columns(optimizer, parameter, name, members)
            found.append(FactoredMoments(key, rows, columns, known[key]))
    return tuple(found)


def _members(name: str) -> list[str]:
    """The buffers that a name stands for: itself, or the two of "rows * columns"."""
    return [member.strip() for member in name.split("*") if member.strip()]


def _rows_and_columns(
    optimizer: Optimizer, parameter: Tensor, name: str, members: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Both as (..., n, 1) and (..., 1, m), of a parameter (..., n, m)."""
    found = []
    for axis, member in zip((-1, -2), members, strict=True):
        value = optimizer.state[parameter].get(member)
        shape = list(parameter.shape)
        if not isinstance(value, Tensor) or len(shape) < 2:
            raise OptimizerStateError(
                f"{type(optimizer).__name__} keeps only one of '{members[0]}' and '{members[1]}' "
                f"for '{name}', or keeps them for a vector; nothing was written"
            )
        shape[axis] = 1
        without = [size for k, size in enumerate(shape) if k != len(shape) + axis]
        if list(value.shape) == without:
            value = value.unsqueeze(axis)
        elif list(value.shape) != shape:
            raise _unknown(optimizer, member, value, name)
        found.append(value)
    return found[0], found[1]


def _refuse_joint_state(optimizer: Optimizer) -> None:
    """LBFGS keeps all parameters' history in the state of the first one: never found by name."""
    if isinstance(optimizer, torch.optim.LBFGS) and optimizer.state:
        raise OptimizerStateError(
            f"{type(optimizer).__name__} keeps directions through all parameters at once, which "
            "cannot follow a rescaling; rescale before its first step, or clear optimizer.state"
        )


def _is_quantized(tensor: Tensor) -> bool:
    """Whether it holds codes in place of numbers, by its dtype or behind the back of one."""
    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        return False
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        return True
    hides = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return hides and not is_sharded(tensor)


def _quantized(optimizer: Optimizer, key: str, tensor: Tensor, name: str) -> OptimizerStateError:
    kind = type(tensor).__name__
    return OptimizerStateError(
        f"{type(optimizer).__name__} keeps '{key}' of '{name}' quantized "
        f"({tensor.dtype if kind == 'Tensor' else kind}): codes of whole blocks with one scale for "
        "each, which cannot follow a factor for each channel; nothing was written. Keep the state "
        "of weights that are rescaled in 16 bits or more, or rescale before training only"
    )


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _unknown(optimizer: Optimizer, key: str, tensor: Tensor, name: str) -> OptimizerStateError:
    return OptimizerStateError(
        f"{type(optimizer).__name__} keeps the buffer '{key}' of shape {tuple(tensor.shape)} for "
        f"'{name}', and how it follows a rescaled weight is not known; nothing was written. Pass "
        f"buffers={{'{key}': k}} if it takes the k-th power of the weight's factor (-1: linear "
        "in gradients, -2: quadratic, 0: stays), or remove it from the state"
    )
