"""Measured cells in a generated step: where they lie, and the calls that fill them.

Three places, by what it costs to keep them.

stored    one flat workspace: cells that are far fewer than their weight's entries (convolutions),
          and those of small weights, all of which are filled by a handful of calls together
slots     two buffers that all other matrices of a cache's size share; refilled when read again
streamed  larger matrices: piece by piece through one buffer, each time they are read
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
from torch import Tensor

from enorm_fx.step.generated.script import Script
from enorm_fx.step.generated.state import State, joined
from enorm_fx.step.generated.tuning import Tuning
from enorm_fx.step.layout import Entry
from enorm_fx.step.measure import accumulation_dtype, by_cells
from enorm_fx.step.recipe import Recipe

_SLOTS = 2

Kind = tuple[torch.dtype, torch.device]
# Axes of a tensor, as (kept, size): those that are not kept are summed over.
Axes = list[tuple[bool, int]]


class CellStorage:
    """The cells of all blocks of a recipe."""

    def __init__(self, script: Script, recipe: Recipe, state: State, tuning: Tuning) -> None:
        self._script, self._recipe, self._state, self._tuning = script, recipe, state, tuning
        self._blocks: dict[int, list[int]] = {}  # by entry
        for number, block in enumerate(recipe.layout.blocks):
            self._blocks.setdefault(block.entry, []).append(number)
        self._place = {entry: self._placed(entry) for entry in self._blocks}
        self._regions = self._allocate()
        self._values: dict[int, Tensor] = {}
        self._loaded: dict[Kind, dict[int, int]] = {}  # slot by entry, least recently read first
        self._memory: dict[tuple[str, Kind], Tensor] = {}

    def stored(self, block: int) -> Tensor | None:
        """The block's values, a view of the workspace, where they stay for the whole step."""
        return self._values.get(block)

    def streamed(self, block: int) -> bool:
        return self._place[self._recipe.layout.blocks[block].entry] == "streamed"

    def resident(self, block: int) -> bool:
        """Reading it now costs no filling."""
        entry = self._recipe.layout.blocks[block].entry
        return self._place[entry] == "stored" or entry in self._loaded.get(self._kind(entry), {})

    def like(self, block: int) -> Tensor:
        """An empty tensor of the dtype and on the device of the block's values."""
        dtype, device = self._kind(self._recipe.layout.blocks[block].entry)
        return torch.empty(0, dtype=dtype, device=device)

    def pieces(self, number: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, values) of the block: at once, or by rows, each to be read before the next.

        Calls that fill them are written when the iterator gets there.
        """
        block = self._recipe.layout.blocks[number]
        if number in self._values:
            yield 0, self._values[number]
        elif not self.streamed(number):
            slot = self._load(block.entry)
            yield 0, self._script.named(slot.view(block.shape), self._script.name_of(slot))
        else:
            weight = self._recipe.weights[block.entry]
            matrix = self._script.named(weight.view(block.shape), self._script.name_of(weight))
            for start, rows in self._chunks(matrix):
                powers = self._shared("buffer", block.entry, rows)
                self._power(rows, powers)
                yield start, powers

    def product(self, number: int, values: Tensor) -> Tensor:
        """Room for values of the block times their factors, in the memory order of the values."""
        entry = self._recipe.layout.blocks[number].entry
        if values.dim() > 1 and values.stride(-2) == 1:
            room = self._shared("product", entry, values.transpose(-1, -2)).transpose(-1, -2)
            return self._script.named(room, "product_t")
        return self._shared("product", entry, values)

    def measure(self) -> None:
        """Write the calls that fill what is stored."""
        together = sorted((e for e in self._regions if self._run(e)), key=self._together)
        for (_, run, *_), members in groupby(together, key=self._together):
            self._fill_together([*members], run)
        for entry in self._regions:
            if not self._run(entry):
                self._fill(entry)
        for entry in self._regions:
            self._split(entry)

    # ---- places ----

    def _kind(self, entry: int) -> Kind:
        weight = self._recipe.weights[entry]
        return accumulation_dtype(weight.dtype, self._recipe.p, wide=False), weight.device

    def _placed(self, entry: int) -> str:
        layout, numbers = self._recipe.layout, self._blocks[entry]
        weight, block = self._recipe.weights[entry], layout.blocks[numbers[0]]
        matrix = len(block.shape) == 2 and all(len(part.axes) == 1 for part in block.parts)
        if layout.entries[entry].cells != tuple(weight.shape) or block.removed is not None:
            return "stored"
        if weight.numel() <= (self._tuning.small if matrix else self._tuning.chunk):
            return "stored"
        if weight.numel() <= self._tuning.chunk or not (matrix and weight.is_contiguous()):
            return "slot"
        return "streamed"

    def _run(self, entry: int) -> int:
        """Entries per cell of a small weight that is filled with its like; 0 for others."""
        weight = self._recipe.weights[entry]
        if weight.numel() > self._tuning.small or not weight.is_contiguous():
            return 0
        axes = _merged(_axes(self._recipe.layout.entries[entry]))
        if all(kept for kept, _ in axes):
            return 1
        return axes[-1][1] if [kept for kept, _ in axes] == [True, False] else 0

    def _together(self, entry: int) -> tuple[bool, int, str, str]:
        """Weights that agree in this are filled by the same calls."""
        weight, run = self._recipe.weights[entry], self._run(entry)
        return run == 0, run, str(weight.dtype), str(weight.device)

    def _allocate(self) -> dict[int, Tensor]:
        """Flat cells of each stored entry; those that are filled together lie together."""
        kinds: dict[Kind, list[int]] = {}
        stored = [entry for entry, place in self._place.items() if place == "stored"]
        for entry in sorted(stored, key=self._together):
            kinds.setdefault(self._kind(entry), []).append(entry)
        regions: dict[int, Tensor] = {}
        for (dtype, device), members in kinds.items():
            sizes = [math.prod(self._recipe.layout.entries[entry].cells) for entry in members]
            flat = torch.empty(sum(sizes), dtype=dtype, device=device)
            regions |= dict(zip(members, flat.split(sizes), strict=True))
        for entry, region in regions.items():
            self._script.named(region, f"{self._recipe.layout.entries[entry].name}_cells")
        return regions

    def _shared(self, purpose: str, entry: int, like: Tensor) -> Tensor:
        """Memory for a tensor of this shape, overwritten by its next user."""
        kind = self._kind(entry)
        if (purpose, kind) not in self._memory:
            sizes = [self._needs(purpose, e) for e in self._blocks if self._kind(e) == kind]
            # Multiply of small blocks may be formed together.
            small = sum(size for size in sizes if size <= self._tuning.small)
            size = max(small if purpose == "product" else 0, *sizes)
            self._memory[purpose, kind] = torch.empty(size, dtype=kind[0], device=kind[1])
        view = self._memory[purpose, kind][: like.numel()].view(like.shape)
        return self._script.named(view, purpose)

    def _needs(self, purpose: str, entry: int) -> int:
        """Entries that the purpose wants to hold of this entry at once."""
        weight, place = self._recipe.weights[entry], self._place[entry]
        line, _ = _arranged(weight, self._recipe.layout.entries[entry])
        chunk = min(weight.numel(), max(self._tuning.chunk, weight.numel() // len(line)))
        cells = math.prod(self._recipe.layout.entries[entry].cells)
        if purpose == "product":
            return chunk if place == "streamed" else cells
        if purpose == "buffer":
            return chunk
        return cells if place == "slot" else 0

    # ---- filling ----

    def _chunks(self, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(start, part) along the first axis, each of the size of a buffer or one row."""
        step = max(1, self._tuning.chunk // max(1, tensor[0].numel()))
        for start in range(0, len(tensor), step):
            part = tensor[start : start + step]
            yield start, self._script.named(part, f"{self._script.name_of(tensor)}_{start}")

    def _load(self, entry: int) -> Tensor:
        """The slot that holds a matrix; filled, if it held another."""
        weight, slots = self._recipe.weights[entry], self._loaded.setdefault(self._kind(entry), {})
        fresh = entry not in slots
        if not fresh or len(slots) == _SLOTS:
            # The least recently read gives way: in a chain, the next group finds its matrix.
            number = slots.pop(next(iter(slots)) if fresh else entry)
        else:
            number = len(slots)
        slots[entry] = number
        slot = self._shared(f"slot_{number}", entry, weight)
        if fresh:
            self._power(weight, slot)
        return slot

    def _fill_together(self, members: list[int], run: int) -> None:
        weights = [self._recipe.weights[entry] for entry in members]
        cells = joined([self._regions[entry] for entry in members])
        self._script.named(cells, "small_cells" if run == 1 else f"small_cells_of_{run}")
        lines = [self._script.named(w.view(-1), self._script.name_of(w)) for w in weights]
        if run == 1:
            self._script.call(torch.cat, lines, out=cells)
            self._power(cells, cells)
            return
        entries = self._script.scratch("small_entries", (len(cells) * run,), cells)
        self._script.call(torch.cat, lines, out=entries)
        self._power(entries, entries)
        self._sum(entries, [(True, len(cells)), (False, run)], cells)

    def _fill(self, entry: int) -> None:
        """Sums over the axes along which factors do not vary, through a buffer."""
        layout, weight = self._recipe.layout.entries[entry], self._recipe.weights[entry]
        out = self._regions[entry]
        view, axes = _arranged(weight, layout)
        if all(kept for kept, _ in axes):
            cells = self._script.named(out.view(weight.shape), f"{layout.name}_cells")
            self._power(weight, cells)
            return
        self._script.named(view, layout.name)
        inner = _merged(axes[1:])
        kept = math.prod(size for keep, size in inner if keep)
        first_kept = axes[0][0]
        rest = math.prod(size for _, size in inner)
        total = out if kept == rest else self._script.scratch("line", (rest,), out)
        for start, part in self._chunks(view):
            powers = self._shared("buffer", entry, part)
            self._power(part, powers)
            if first_kept:
                cells = out[start * kept : (start + len(part)) * kept]
                self._script.named(cells, f"{layout.name}_cells_{start}")
                self._sum(powers, _merged([(True, len(part)), *inner]), cells)
            else:
                self._sum(powers, [(False, len(part)), (True, rest)], total, add=start > 0)
        if not first_kept and kept < rest:
            self._sum(total, inner, out)

    def _split(self, entry: int) -> None:
        """CellStorage that have a block of their own leave the dense one."""
        cells, blocks = self._regions[entry], self._recipe.layout.blocks
        name = self._recipe.layout.entries[entry].name
        for number in self._blocks[entry]:
            picked = blocks[number].picked
            if picked is not None:
                values = self._script.named(cells.new_empty(len(picked)), f"{name}_picked")
                index = self._script.named(picked, f"{name}_positions_picked")
                self._script.call(torch.index_select, cells, 0, index, out=values)
                self._values[number] = values
        for number in self._blocks[entry]:
            block = blocks[number]
            if block.removed is not None:
                # They could hold a NaN that no marginal sees.
                total = self._script.named(self._state.take(1).view(()), f"{name}_total")
                self._script.call("copy_", total, self._script.call(torch.sum, cells))
                index = self._script.named(block.removed, f"{name}_positions_removed")
                self._script.call("index_fill_", cells, 0, index, 0.0)
            if block.picked is None:
                values = cells.view(block.shape)
                self._values[number] = self._script.named(values, f"{name}_cells")

    def _power(self, source: Tensor, out: Tensor) -> None:
        """out = |source|^p, or |source|; computed in out's dtype."""
        if source.dtype != out.dtype:
            self._script.call("copy_", out, source)
            source = out
        if self._recipe.p == 2.0:
            self._script.call(torch.mul, source, source, out=out)
            return
        self._script.call(torch.abs, source, out=out)
        if self._recipe.p not in (1.0, math.inf):
            self._script.call("pow_", out, self._recipe.p)

    def _sum(self, tensor: Tensor, axes: Axes, out: Tensor, add: bool = False) -> None:
        """out = the sums (p = inf: maxima) over all axes that are not kept; add: or onto it."""
        reduced = [number for number, (kept, _) in enumerate(axes) if not kept]
        shaped = self._script.named(tensor.view([size for _, size in axes]), "entries")
        shape = [size for kept, size in axes if kept]
        if math.isinf(self._recipe.p):
            target = self._script.scratch("maxima", (out.numel(),), out) if add else out
            view = self._script.named(target.view(shape), "maxima")
            self._script.call(torch.amax, shaped, reduced, out=view)
            if add:
                self._script.call(torch.maximum, out, target, out=out)
        elif len(axes) == 2:
            matrix = shaped if reduced == [1] else self._script.named(shaped.t(), "entries")
            ones = self._script.ones(axes[reduced[0]][1], out)
            if add:
                self._script.call("addmv_", out, matrix, ones)
            else:
                self._script.call(torch.mv, matrix, ones, out=out)
        else:
            view = self._script.named(out.view(shape), "sums")
            self._script.call(torch.sum, shaped, reduced, out=view)


def _axes(entry: Entry) -> Axes:
    """The axes of `by_cells`."""
    out: Axes = []
    for cells, run in zip(entry.cells, entry.runs, strict=True):
        if cells > 1 or run == 1:
            out.append((True, cells))
        if run > 1:
            out.append((False, run))
    return out


def _merged(axes: Iterable[tuple[bool, int]]) -> Axes:
    """Neighbours of a kind as one axis, of memory that is contiguous."""
    out: Axes = []
    for kept, size in axes:
        if out and out[-1][0] == kept:
            out[-1] = kept, out[-1][1] * size
        elif size > 1:
            out.append((kept, size))
    return out or [(True, 1)]


def _arranged(weight: Tensor, entry: Entry) -> tuple[Tensor, Axes]:
    """`by_cells` without axes of one entry, slowest first where that keeps the order of the kept
    axes, as in channels_last; and its axes."""
    if not entry.shape:
        return weight.view(1), [(True, 1)]
    view, axes = by_cells(weight, entry), _axes(entry)
    order = [axis for axis in range(view.dim()) if view.shape[axis] > 1] or [0]
    by_stride = sorted(order, key=view.stride, reverse=True)
    kept = [axis for axis in by_stride if axes[axis][0]]
    if kept == sorted(kept):
        order = by_stride
    rest = [axis for axis in range(view.dim()) if axis not in order]
    shape = [view.shape[axis] for axis in order]
    return view.permute(*order, *rest).view(shape), [axes[axis] for axis in order]
