"""The memory of a step that writes to addresses: what it must be like, and whether it still is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, ge, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from enorm_fx.step.fused.counts import Counts
from enorm_fx.step.fused.held import (
    Held,
    bounds_after,
    buffers_of,
    check_held,
    limits_of,
    steps_of,
)
from enorm_fx.step.fused.optimizers import BUFFERS, PLAIN, Sizes, kind_of
from enorm_fx.step.guard import Guard
from enorm_fx.step.matrix_view import memory_order
from enorm_fx.step.native.pack import Unsupported
from enorm_fx.step.native.places import places_of

# A group of the optimizer, and the number of the step that parameters of it make, from 1.
Stepping = tuple[dict[str, Any], float]

_DTYPES = (torch.float32, torch.float64)


class FixedMemory:
    """Parameters, buffers and counters as they lie now; `holds` says whether they still do.

    parameters: those with entries. buffers: of each, in the order of BUFFERS. group_of: the number
    of the optimizer's group of each, -1 for none. kinds: of each group. stepping: whether a
    parameter has all that a step needs but a gradient. adder: makes a function that adds one to
    all of these counters and to their versions.

    Raises Unsupported where memory is not plain, or is on other devices than of this type.
    """

    def __init__(
        self,
        model: nn.Module,
        held: Iterable[Held],
        optimizer: Optimizer,
        p: float,
        device: str,
        adder: Callable[[Sequence[Tensor]], Callable[[], None]],
    ) -> None:
        self._optimizer = optimizer
        self.held = [h for h in held if h.parameter.numel()]
        self._groups = list(optimizer.param_groups)
        self._listed = _listed(optimizer)
        self.kinds = [kind_of(optimizer, group) for group in self._groups]
        self._limits = limits_of(self.held, p)
        self.buffers = [_expected(h, optimizer) for h in self.held]
        self._check(device)
        names = {id(q): name for name, q in model.named_parameters()}
        if any(id(h.parameter) not in names for h in self.held):
            raise Unsupported("the optimizer holds parameters that the model does not have")
        self._guard = Guard(
            model,
            [names[id(h.parameter)] for h in self.held],
            {optimizer: sorted({"step", *(name for group in BUFFERS for name in group)})},
            natively=device == "cpu",
        )
        self.parameters = [h.parameter for h in self.held]
        of_group = {id(group): k for k, group in enumerate(self._groups)}
        self.group_of = [-1 if h.group is None else of_group[id(h.group)] for h in self.held]
        self.stepping = [self._may_step(k) for k in range(len(self.held))]
        self._shapes = [(p.dtype, p.stride()) for p in self.parameters]
        counters = [optimizer.state.get(q, {}).get("step") for q in self.parameters]
        there = [counter for counter in counters if counter is not None]
        self._counts = Counts(self.group_of, counters, adder(there))
        self._written = [*self.parameters, *(b for found in self.buffers for b in found)]
        self._versioned = [*self._written, *there]
        self._versions = -1
        self._rise: int | None = None  # of the sum of versions, when all of these are written
        self._usual = _Usual(self.parameters, all(self.stepping), device == "cpu")
        self._sizes: Sizes | None = None

    def holds(self) -> bool:
        """True: every tensor is the one it was, at its place, and the optimizer does the same."""
        groups = self._optimizer.param_groups
        return (
            len(groups) == len(self._groups)
            and all(map(is_, groups, self._groups))
            and [kind_of(self._optimizer, group) for group in groups] == self.kinds
            and len(listed := _listed(self._optimizer)) == len(self._listed)
            and all(map(is_, listed, self._listed))
            and self._guard.holds()
        )

    def _check(self, device: str) -> None:
        for h, buffers in zip(self.held, self.buffers, strict=True):
            parameter = h.parameter
            step = self._optimizer.state.get(parameter, {}).get("step")
            counted = len(buffers) > 1 or step is not None  # Adam counts, SGD does not
            if counted and not isinstance(step, Tensor):
                raise Unsupported(f"the step of '{h.name}' is no tensor")
            if parameter.device.type != device or parameter.dtype not in _DTYPES:
                raise Unsupported(f"'{h.name}' is {parameter.dtype} on {parameter.device}")
            axes = memory_order(parameter)
            if axes is None:
                raise Unsupported(f"'{h.name}' has gaps in its memory")
            for tensor in buffers:
                if tensor.dtype != parameter.dtype or memory_order(tensor) != axes:
                    raise Unsupported(f"a buffer of '{h.name}' lies in memory in another way")
            if any(tensor.is_inference() for tensor in (parameter, *buffers)):
                raise Unsupported(f"'{h.name}' keeps no count of what is written to it")
        places = sorted(
            (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())
            for h, buffers in zip(self.held, self.buffers, strict=True)
            for t in (h.parameter, *buffers)
        )
        if any(end > begin for (_, end), (begin, _) in itertools.pairwise(places)):
            raise Unsupported("parameters or buffers share memory")

    def _may_step(self, number: int) -> bool:
        """Whether all buffers that a step needs are there."""
        group = self.group_of[number]
        return group >= 0 and len(self.buffers[number]) == len(BUFFERS[self.kinds[group]])

    def kind(self, number: int) -> int:
        """What a step does to a parameter; one that makes none has its buffers rescaled."""
        if self.stepping[number]:
            return self.kinds[self.group_of[number]]
        count = len(self.buffers[number])
        return next((kind for kind, names in enumerate(BUFFERS) if len(names) == count), PLAIN)

    def gradients(self) -> list[int] | list[int | None] | None:
        """Where gradients lie; None where one must be looked at with more care."""
        gradients: list[Any] = list(map(_grad, self.parameters))
        # The usual case, all at once: every parameter steps, on a gradient that lies as it does.
        usual = self._usual.addresses(gradients)
        if usual is not None:
            return usual
        found: list[int | None] = []
        for number, parameter in enumerate(self.parameters):
            gradient = parameter.grad if self.group_of[number] >= 0 else None
            if gradient is None:
                found.append(None)
                continue
            dtype, stride = self._shapes[number]
            plain = type(gradient) is Tensor and gradient.layout == torch.strided
            if not (self.stepping[number] and plain and gradient.dtype == dtype):
                return None
            if gradient.stride() != stride and memory_order(gradient) != memory_order(parameter):
                return None
            needed = (gradient.storage_offset() + gradient.numel()) * gradient.element_size()
            if gradient.untyped_storage().nbytes() < needed:
                return None
            found.append(gradient.data_ptr())
        return found

    def look_(self) -> bool:
        """Whether something was written since the last step, or there was none. Bounds and counts
        are then found anew."""
        # Versions only ever grow: where their sum is what it was, each is.
        versions = sum(map(_version, self._versioned))
        if versions == self._versions:
            return False
        self._versions = versions
        self._sizes = None
        self._counts.found_(steps_of(self.held, self._optimizer))
        return True

    def steps(self, gradients: Sequence[int | None]) -> tuple[list[int], list[Stepping]]:
        """What steps: each group and number of a step, once; of each parameter, which of these."""
        numbers, rows = self._counts.rows(gradients)
        return numbers, [(self._groups[group], count) for group, count in rows]

    def admitted(self, stepping: Sequence[Stepping], gradient: float, reach: float) -> Sizes | None:
        """Bounds after the step, from those before: measured where these say too little. None:
        a number may leave its range."""
        for _ in range(2):
            measured = self._sizes is None
            sizes = check_held(self.held, self._optimizer) if self._sizes is None else self._sizes
            found, way = bounds_after(
                self._optimizer, stepping, sizes, gradient, reach, self._limits.tiny
            )
            if self._limits.admit(found, way):
                return found
            if measured:
                return None
            self._sizes = None
        return None

    def written_(self, gradients: Sequence[int | None], sizes: Sizes) -> None:
        """Count the step where torch would, and remember what is written. sizes: bounds now."""
        self._sizes = sizes
        before = sum(map(_version, self._written)) if self._rise is None else 0
        torch.autograd.graph.increment_version(self._written)
        if self._rise is None:  # views of one tensor count together
            self._rise = sum(map(_version, self._written)) - before
        self._versions += self._rise + self._counts.advance_(gradients)


class _Usual:
    """Gradients as they usually are: plain tensors that lie in memory as their parameters do.

    They are looked at by `map`: a loop over a hundred parameters takes longer than a step of small
    ones.
    """

    def __init__(self, parameters: Sequence[Tensor], all_step: bool, natively: bool) -> None:
        self._all_step = all_step
        self._places = places_of(parameters) if natively else None
        self._types = [Tensor] * len(parameters)
        self._layouts = [torch.strided] * len(parameters)
        self._strides = [p.stride() for p in parameters]
        self._dtypes = [p.dtype for p in parameters]
        self._bytes = [p.numel() * p.element_size() for p in parameters]

    def addresses(self, gradients: list[Any]) -> list[int] | None:
        """Where they lie; None where they are not so."""
        if not self._all_step or list(map(type, gradients)) != self._types:
            return None
        of_alike = self._of_alike if self._places is None else self._places.of_alike
        found = of_alike(gradients)
        if found is None or any(map(Tensor.storage_offset, gradients)):
            return None
        held = map(_nbytes, map(Tensor.untyped_storage, gradients))
        return found if all(map(ge, held, self._bytes)) else None

    def _of_alike(self, gradients: list[Any]) -> list[int] | None:
        alike = (
            list(map(_layout, gradients)) == self._layouts
            and list(map(Tensor.stride, gradients)) == self._strides
            and list(map(_dtype, gradients)) == self._dtypes
        )
        return list(map(Tensor.data_ptr, gradients)) if alike else None


_version, _grad = attrgetter("_version"), attrgetter("grad")
_layout, _dtype = attrgetter("layout"), attrgetter("dtype")
_nbytes = torch.UntypedStorage.nbytes


def _listed(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _expected(held: Held, optimizer: Optimizer) -> tuple[Tensor, ...]:
    """The buffers of a parameter, in their order; all that its kind has, or none."""
    found = buffers_of(held, optimizer)
    if not found:
        return ()
    names = BUFFERS[kind_of(optimizer, held.group)] if held.group is not None else ()
    if set(found) != set(names):
        raise Unsupported(f"the state of '{held.name}' is not that of its optimizer's settings")
    return tuple(found[name] for name in names)
