"""Weights of which each process holds a part: FSDP2's and tensor parallel's DTensors.

A step needs of a weight some sums and maxima along its channels. Each process takes them over the
part that it holds, and one reduction of these vectors, never of weights, makes them whole. The
log scales are then found by each process for itself, from the same numbers, and each multiplies
its own part. Before anything is written all processes compare what they have found.

torch.distributed is not imported here unless a parameter shows that the program uses it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from enorm_fx.errors import EnormError, PlanError
from enorm_fx.step.layout import CellTerm, Entry, Part

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """Which part of a parameter this process holds.

    positions: by axis, the places along it that this process holds, int64; None: all.
    groups: process groups that a sum over this process's part must be reduced over, by turn.
    """

    positions: tuple[Tensor | None, ...]
    groups: tuple[Any, ...]


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The memory that this process holds of a tensor: the tensor itself where it is a plain one."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        held: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return held


def same_part(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether this process holds the same part of both, as of a weight and its momentum."""
    if not is_sharded(tensor) and not is_sharded(parameter):
        return True
    if not (is_sharded(tensor) and is_sharded(parameter)):
        return False
    one: Any = tensor
    other: Any = parameter
    same: bool = one.placements == other.placements and one.device_mesh == other.device_mesh
    return same


def reshard_(model: nn.Module) -> None:
    """FSDP2 may have left gathered copies in the place of parameters: let go of them.

    After an evaluation it does so for the outermost module. What is written into such a copy is
    lost.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FSDPModule", None)
    if kind is not None:
        for part in model.modules():
            if isinstance(part, kind):
                part.reshard()


def placement(tensor: Tensor) -> object:
    """What tells one way of lying on several processes from another; None for a plain tensor."""
    if not is_sharded(tensor):
        return None
    held: Any = tensor
    return held.placements, held.device_mesh, tuple(local(tensor).shape)


def shard_of(parameter: Tensor, name: str) -> Shard | None:
    """Which part of it this process holds; None for a plain tensor. All processes must call it.

    Raises PlanError where the parts are no slices of the whole, or lie on some processes only.
    """
    if not is_sharded(parameter):
        return None
    from torch.distributed import get_world_size

    held: Any = parameter
    mesh, placements = held.device_mesh, held.placements
    if mesh.size() != get_world_size() or mesh.get_coordinate() is None:
        raise PlanError(
            f"'{name}' lies on {mesh.size()} of {get_world_size()} processes; only parameters that "
            "lie on all of them can be rescaled; nothing was written"
        )
    if any(p.is_partial() for p in placements):
        raise PlanError(
            f"'{name}' is the sum of what the processes hold ({placements}), which cannot be "
            "rescaled part by part; nothing was written"
        )
    positions = tuple(
        _positions(held, axis, name) if any(_splits(p, axis) for p in placements) else None
        for axis in range(held.dim())
    )
    groups = tuple(
        mesh.get_group(number)
        for number, p in enumerate(placements)
        if any(_splits(p, axis) for axis in range(held.dim()))
    )
    return Shard(positions, groups)


def _splits(placement: Any, axis: int) -> bool:
    """Whether the placement cuts that axis. A strided one is no instance of Shard."""
    return not placement.is_replicate() and not placement.is_partial() and placement.dim == axis


def _positions(parameter: Any, axis: int, name: str) -> Tensor:
    """The places along an axis that this process holds.

    They are computed, then gathered as a DTensor that lies as the parameter does: a way of cutting
    that is not known here is found out, never guessed.
    """
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Cut

    mesh, size = parameter.device_mesh, parameter.shape[axis]
    device = local(parameter).device
    held = torch.arange(size, device=device)
    placements: list[Any] = []
    for number, (rank, p) in enumerate(
        zip(mesh.get_coordinate(), parameter.placements, strict=True)
    ):
        if not _splits(p, axis):
            placements.append(Replicate())
            continue
        factor = getattr(p, "split_factor", 1)
        parts = [_chunk(piece, mesh.size(number), rank) for piece in held.chunk(factor)]
        held = torch.cat(parts)
        placements.append(Cut(0) if type(p) is Cut else type(p)(0, split_factor=factor))
    known = len(held) == local(parameter).shape[axis]
    gathered = DTensor.from_local(
        held if known else held.new_zeros(local(parameter).shape[axis]), mesh, placements,
        run_check=False, shape=torch.Size([size]), stride=(1,),
    ).full_tensor()  # fmt: skip
    if not torch.equal(gathered, torch.arange(size, device=device)):
        raise PlanError(
            f"'{name}' is spread over processes in a way that is not known ({parameter.placements} "
            f"of {mesh}); nothing was written"
        )
    return held


def _chunk(piece: Tensor, count: int, number: int) -> Tensor:
    """One of as many pieces as torch.chunk would make of it, the last ones empty if need be."""
    size = -(-len(piece) // count)
    return piece[number * size : (number + 1) * size]


def local_entry(entry: Entry, shard: Shard | None) -> Entry:
    """The entry as if the part that this process holds were the parameter."""
    if shard is None:
        return entry
    shape, cells, runs = list(entry.shape), list(entry.cells), list(entry.runs)
    numbers: dict[int, Tensor] = {}  # by axis, the cell of each place that is held
    for axis, held in enumerate(shard.positions):
        if held is None:
            continue
        shape[axis] = len(held)
        if entry.cells[axis] == 1:
            runs[axis] = len(held)
        else:
            numbers[axis] = held // entry.runs[axis]
            cells[axis], runs[axis] = len(held), 1
    parts = tuple(_local_part(part, numbers) for part in entry.parts)
    return replace(entry, shape=tuple(shape), cells=tuple(cells), runs=tuple(runs), parts=parts)


def _local_part(part: Part, numbers: dict[int, Tensor]) -> Part:
    """The part's terms at the places that are held."""
    shape = list(part.shape)
    terms = [term.ids.view(part.shape) for term in part.terms]
    for axis in part.axes:
        if axis in numbers:
            index = numbers[axis]
            shape[axis] = len(index)
            terms = [ids.index_select(axis, index.to(ids.device)) for ids in terms]
    found = (
        CellTerm(term.coefficient, ids.reshape(-1))
        for term, ids in zip(part.terms, terms, strict=True)
    )
    return Part(part.axes, tuple(shape), tuple(found))


def reduce_(tensors: Sequence[tuple[tuple[Any, ...], Tensor]], largest: bool) -> None:
    """Sums (or maxima) over processes of tensors with their `Shard.groups`, each in place.

    Those with the same groups and type travel together: one reduction for each group.
    """
    together: dict[Any, list[Tensor]] = {}
    for groups, tensor in tensors:
        if groups:
            together.setdefault((groups, tensor.dtype, tensor.device), []).append(tensor)
    for (groups, _, _), members in together.items():
        from torch.distributed import ReduceOp, all_reduce

        flat = torch.cat([member.reshape(-1) for member in members])
        for group in groups:
            all_reduce(flat, ReduceOp.MAX if largest else ReduceOp.SUM, group=group)
        sizes = [member.numel() for member in members]
        for member, values in zip(members, flat.split(sizes), strict=True):
            member.copy_(values.view(member.shape))


def agreed(attempt: Callable[[], Made], found: Iterable[Tensor], device: torch.device) -> Made:
    """What the attempt gives, if it succeeds in all processes and all have found the same.

    found: float64 tensors that must be equal in all processes, to the last bit.

    Raises in all processes: the attempt's own error where it failed, PlanError elsewhere.
    """
    from torch.distributed import ReduceOp, all_reduce

    made, error = None, None
    try:
        made = attempt()
    except EnormError as raised:
        error = raised
    total = sum((digest(tensor) for tensor in found), start=torch.zeros((), dtype=torch.int64))
    failed = torch.tensor(error is not None, dtype=torch.int64)
    # The largest of a number and of its complement tell whether all numbers are equal.
    answers = torch.stack([failed, total, ~total]).to(device)
    all_reduce(answers, ReduceOp.MAX)
    failures, most, complement = answers.tolist()
    if error is not None:
        raise error
    if failures:
        raise PlanError("another process cannot make this step, and says why; nothing was written")
    if most != ~complement:
        raise PlanError(
            "the processes have found different numbers, so the weights were not the same before; "
            "nothing was written. Start all of them from the same weights and the same plan, and "
            "let no process alone change a replicated parameter"
        )
    return made  # type: ignore[return-value]


def digest(tensor: Tensor) -> Tensor:
    """An int64 that tells two tensors of float64 apart by every bit; the same on every machine."""
    bits = tensor.detach().cpu().contiguous().view(-1).view(torch.int64)
    odd = 2 * torch.arange(len(bits)) + 0x9E3779B97F4A7C1
    mixed = (bits ^ (bits >> 29)) * odd
    return (mixed ^ (mixed >> 31)).sum()
