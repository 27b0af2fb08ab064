"""Watch the calls in which a model's weights read activations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from enorm_fx.calibration.quantize import rounded
from enorm_fx.calibration.readings import Reading, readings
from enorm_fx.calibration.views import View, Views
from enorm_fx.plan.activations import Reader
from enorm_fx.plan.data import PlanData
from enorm_fx.step.checks import find_parameter
from enorm_fx.tracing.op_keys import op_key


class Observer(TorchFunctionMode):
    """While it is active, is shown every call of this thread that reads with one of the weights.

    Torch's calls are watched and not modules: weights that a model uses by functions are seen too,
    and nothing is left behind on the modules.
    """

    def __init__(self, plan: PlanData, readers: Iterable[Reader]) -> None:
        super().__init__()
        self._readers: dict[str, list[Reader]] = {}
        for reader in readers:
            self._readers.setdefault(reader.parameter.name, []).append(reader)
        self._views = Views({name: find_parameter(plan.model, name) for name in self._readers})
        self._num_scales = plan.num_scales
        self._places: dict[tuple[View, torch.device], list[tuple[float, Tensor]]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for reading in readings(op_key(func)[0], func, args, kwargs):
            view = self._views.find(reading.weight)
            if view is not None:
                self.see(reading, view)
        return func(*args, **kwargs)

    def see(self, reading: Reading, view: View) -> None:
        """Look at a reading by a part of one of the weights."""
        raise NotImplementedError

    def scales_at(self, view: View, device: torch.device) -> list[tuple[float, Tensor]]:
        """(coefficient, numbers of scales) of the terms that take scales back from the activation.

        The numbers broadcast against the part of the weight; num_scales stands for none.
        """
        key = (view, device)
        if key not in self._places:
            self._places[key] = []
            for reader in self._readers[view.name]:
                for term in reader.terms.values():
                    index = view.of(term.index)
                    index = torch.where(index < 0, self._num_scales, index)
                    self._places[key].append((term.coefficient, index.to(device)))
        return self._places[key]


class Statistics(Observer):
    """The size of the activations of each scale, running over all calls that read them.

    norm: inf for max |x|, 1 for the mean of |x|. Accumulated on the devices of the activations.
    finite: by weight, in the order in which they were met, whether all that it read is finite.
    """

    def __init__(self, plan: PlanData, readers: Iterable[Reader], norm: float) -> None:
        super().__init__(plan, readers)
        self._norm = norm
        self._totals: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.finite: dict[str, Tensor] = {}

    def see(self, reading: Reading, view: View) -> None:
        x = reading.activation()
        if not x.numel():
            return
        kept = [axis % x.dim() for axis in reading.kept]
        rest = tuple(axis for axis in range(x.dim()) if axis not in kept)
        size = largest(x, rest) if math.isinf(self._norm) else _sum_of_sizes(x, rest)
        finite = size.isfinite().all()
        self.finite[view.name] = finite & self.finite.get(view.name, finite)
        values = reading.arrange(size)
        count = x.numel() // size.numel()
        sums, counts = self._on(x.device)
        for _, index in self.scales_at(view, x.device):
            at, value = (t.reshape(-1) for t in torch.broadcast_tensors(index, values))
            if math.isinf(self._norm):
                sums.scatter_reduce_(0, at, value.to(sums), "amax")
                counts[at] = 1
            else:
                sums.scatter_add_(0, at, value.to(sums))
                counts.scatter_add_(0, at, torch.full_like(value, count, dtype=counts.dtype))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(sums or maxima, number of entries or 1) by scale; the last place is for none."""
        if device not in self._totals:
            wide = torch.float32 if device.type == "mps" else torch.float64
            zeros = torch.zeros(self._num_scales + 1, dtype=wide, device=device)
            self._totals[device] = (zeros, zeros.clone())
        return self._totals[device]

    def result(self) -> Tensor:
        """max |x| or mean |x| of every scale, float64 (num_scales,); NaN where none was read."""
        sums = counts = torch.zeros(self._num_scales, dtype=torch.float64)
        for one, number in self._totals.values():
            one, number = one[:-1].cpu().double(), number[:-1].cpu().double()
            sums = torch.maximum(sums, one) if math.isinf(self._norm) else sums + one
            counts = counts + number
        return torch.where(counts > 0, sums if math.isinf(self._norm) else sums / counts, math.nan)


def largest(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """max |x| over some axes; NaN if one is. Faster than the norm, and without a copy of x."""
    return torch.maximum(x.amax(axes), -x.amin(axes)) if axes else x.abs()


def _sum_of_sizes(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    x = x.abs()
    return x.sum(axes, dtype=torch.promote_types(x.dtype, torch.float32)) if axes else x


class QuantizationErrors(Observer):
    """Squared errors of what quantized weights give, summed over all calls, for some candidates.

    logs: (candidates, num_scales) log scales of activations to try.
    part_of: by weight, the number of the sum that its errors go to.
    """

    def __init__(
        self,
        plan: PlanData,
        readers: Iterable[Reader],
        logs: Tensor,
        part_of: Mapping[str, int],
        bits: int,
        group_size: int | None,
    ) -> None:
        super().__init__(plan, readers)
        self._logs = torch.cat([logs, logs.new_zeros(len(logs), 1)], dim=1)
        self._part_of, self._bits, self._group_size = part_of, bits, group_size
        self._parts = 1 + max(part_of.values(), default=-1)
        self._sums: dict[torch.device, Tensor] = {}

    def see(self, reading: Reading, view: View) -> None:
        weight = reading.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        exact = reading.call(weight).to(wide)
        errors = []
        for logs in self._logs.to(weight.device, wide):
            log_factor = sum(
                coefficient * logs[index]
                for coefficient, index in self.scales_at(view, weight.device)
            )
            factor = torch.exp(torch.as_tensor(log_factor))
            quantized = rounded(
                weight.to(wide) * factor,
                reading.outputs, self._bits, self._group_size, reading.split,
            )  # fmt: skip
            output = reading.call((quantized / factor).to(weight.dtype))
            errors.append((output.to(wide) - exact).square().sum())
        if weight.device not in self._sums:
            self._sums[weight.device] = torch.zeros(
                self._parts, len(self._logs), dtype=wide, device=weight.device
            )
        self._sums[weight.device][self._part_of[view.name]] += torch.stack(errors)

    def result(self) -> Tensor:
        """The sums, float64 (parts, candidates)."""
        total = torch.zeros(self._parts, len(self._logs), dtype=torch.float64)
        for sums in self._sums.values():
            total += sums.cpu().double()
        return total
