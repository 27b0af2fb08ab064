"""Which part of which parameter a tensor is a view of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class View:
    """A tensor that looks at a part of a parameter.

    name:   the parameter's.
    ranges: the part, as (first, length) for each axis of the parameter.
    axes:   for each axis of the tensor the axis of the parameter that it runs along, -1 for none.
    """

    name: str
    ranges: tuple[tuple[int, int], ...]
    axes: tuple[int, ...]

    def of(self, values: Tensor) -> Tensor:
        """The same view of something that broadcasts against the parameter, axis by axis."""
        for axis, (first, length) in enumerate(self.ranges):
            if values.shape[axis] > 1:
                values = values.narrow(axis, first, length)
        shown = [axis for axis in self.axes if axis >= 0]
        rest = [axis for axis in range(values.dim()) if axis not in shown]
        ordered = values.permute(*shown, *rest)
        return ordered.reshape([values.shape[axis] if axis >= 0 else 1 for axis in self.axes])


class Views:
    """The parameters of a model, found again in the tensors that calls are given."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._owners = {_memory(p): (name, p) for name, p in parameters.items()}

    def find(self, tensor: Tensor) -> View | None:
        """The view that a tensor is; None where it is none, or its axes are not the parameter's."""
        found = self._owners.get(_memory(tensor))
        if found is None or tensor.dtype != found[1].dtype:
            return None
        name, parameter = found
        axis_of = {stride: axis for axis, (n, stride) in enumerate(_extents(parameter)) if n > 1}
        starts = [0] * parameter.dim()
        rest = int(tensor.storage_offset()) - int(parameter.storage_offset())
        for stride, axis in sorted(axis_of.items(), reverse=True):
            starts[axis], rest = divmod(rest, stride)
        lengths, axes = [1] * parameter.dim(), []
        for length, stride in _extents(tensor):
            repeated = length == 1 or stride == 0
            if not repeated and stride not in axis_of:
                return None
            axes.append(-1 if repeated else axis_of[stride])
            if not repeated:
                lengths[axis_of[stride]] = length
        ranges = tuple(zip(starts, lengths, strict=True))
        fits = all(a + n <= size for (a, n), size in zip(ranges, parameter.shape, strict=True))
        return View(name, ranges, tuple(axes)) if fits else None


def _memory(tensor: Tensor) -> int:
    """An identity of the memory behind a tensor; 0 where there is none."""
    if tensor.layout is not torch.strided:
        return 0
    return int(tensor.untyped_storage()._cdata)


def _extents(tensor: Tensor) -> list[tuple[int, int]]:
    """(length, stride) of every axis."""
    return [*zip(tensor.shape, tensor.stride(), strict=True)]
