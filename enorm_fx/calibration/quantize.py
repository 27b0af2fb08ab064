"""Round weights to a few bits, as a quantizer of weights alone would, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rounded(
    weight: Tensor, outputs: tuple[int, ...], bits: int, group_size: int | None, split: int = 1
) -> Tensor:
    """The weight with every entry at the nearest of 2^bits levels of its run.

    The levels of a run lie evenly between its smallest and its largest entry, zero among them
    (asymmetric quantization, to nearest). A run is `group_size` consecutive entries that belong to
    one output, the last one of an output maybe fewer; all of them for None.

    outputs: axes that number the outputs, after the first axis was split into `split` parts and a
             rest where `split` > 1.
    """
    parts = weight.unflatten(0, (split, -1)) if split > 1 else weight
    rest = tuple(axis for axis in range(parts.dim()) if axis not in outputs)
    order = (*outputs, *rest)
    ordered = parts.permute(order)
    rows = ordered.reshape(-1, ordered[(0,) * len(outputs)].numel())
    done = _rounded_rows(rows, bits, group_size).view(ordered.shape)
    back = sorted(range(len(order)), key=order.__getitem__)
    return done.permute(back).reshape(weight.shape)


def _rounded_rows(rows: Tensor, bits: int, group_size: int | None) -> Tensor:
    length = rows.shape[1]
    size = min(group_size or length, length)
    missing = -length % size
    runs = (F.pad(rows, (0, missing)) if missing else rows).unflatten(1, (-1, size))
    low, high = runs.amin(2, keepdim=True).clamp_(max=0), runs.amax(2, keepdim=True).clamp_(min=0)
    levels = 2**bits - 1
    step = (high - low).div_(levels)
    step = torch.where(step > 0, step, 1.0)
    zero = (-low / step).round_()  # the level that stands for 0
    entries: Tensor = (runs / step).round_().clamp_(-zero, levels - zero).mul_(step)
    return entries.flatten(1)[:, :length]
