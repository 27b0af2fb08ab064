"""A recipe packed into the tables that step.cpp runs through."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from enorm_fx.step.factors import Write
from enorm_fx.step.layout import Block, CellTerm, GroupLayout, first_of_run
from enorm_fx.step.matrix_view import MatrixView, cell_numbers, make_view, memory_order
from enorm_fx.step.measure import accumulation_dtype
from enorm_fx.step.native import tables
from enorm_fx.step.recipe import Recipe

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_MOST_IDS = 2**31 - 1  # ids are 32 bits wide in the tables
_FEW_ENTRIES = 1 << 18  # written entries below which threads cost more than they bring
# How far factors may go: well inside the range of the dtype that they are computed in.
_REACH = {torch.float32: 80.0, torch.float64: 600.0}


Row = dict[str, Any]  # a structure of tables.h, by the names of its fields


class Unsupported(Exception):
    """This recipe is not for the native backend. Never reaches the user."""


def threads_for(entries: int) -> int:
    """How many threads are worth it for so many entries that are written."""
    return 1 if entries < _FEW_ENTRIES else max(1, torch.get_num_threads())


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """What tables were made of, in their order."""

    blocks: list[Row]
    passes: list[Row]
    scalers: list[Row]
    writes: list[Row]


class Packer:
    """Builds the tables of one recipe. Tensors and tables are kept alive in `keep`.

    threads: how many may run it; 0: as many as are worth it for what the recipe writes.
    """

    def __init__(self, recipe: Recipe, threads: int = 0) -> None:
        self.recipe = recipe
        self.keep: list[Any] = []
        written = sum(write.tensor.numel() for write in recipe.writes)
        self.threads = threads or threads_for(written)
        self.scales = recipe.layout.num_scales
        terms = [t for e in recipe.layout.entries for part in e.parts for t in part.terms]
        terms += [t for b in recipe.layout.blocks for part in b.parts for t in part.terms]
        self.coefficients = [1.0, *sorted({t.coefficient for t in terms} - {1.0})]
        self.exponents = sorted({write.exponent for write in recipe.writes})
        self.products = sorted({x * a for x in self.exponents for a in self.coefficients})
        self.forms: list[MatrixView] = []
        self.form_numbers: dict[object, int] = {}
        self.sources: list[Row] = []
        self.rows = PackedRows([], [], [], [])
        self.owner = torch.full((self.scales + 1,), -1)
        for number, group in enumerate(recipe.layout.groups):
            self.owner[group.start : group.start + group.channels] = number

    def pack(self) -> Any:
        """The table of tables. It points into what `keep` holds."""
        recipe = self.recipe
        if max([self.scales, *(weight.numel() for weight in recipe.weights)]) >= _MOST_IDS:
            raise Unsupported("more entries than 32 bits number")
        rates = [entry.rate for entry in recipe.layout.entries]
        limits = [math.log(torch.finfo(weight.dtype).max) for weight in recipe.weights]
        weights = [self._source(number, weight) for number, weight in enumerate(recipe.weights)]
        blocks, block_forms = self._blocks(weights, rates, limits)
        passes, touches, groups, batches, met = self._turns(block_forms)
        read = {recipe.layout.blocks[block].entry for block in met}
        checks = [
            {"source": weights[number], "rate": rates[number], "limit": limits[number]}
            for number in range(len(recipe.weights))
            if number not in read
        ]
        scalers, writes = self._writes()
        self.rows = PackedRows(blocks, passes, scalers, writes)
        forms = self._table(tables.Form, [self._form(form) for form in self.forms])
        rows = max((form.rows for form in self.forms), default=1)
        cols = max((form.cols * form.run for form in self.forms), default=1)
        channels = max((group.channels for group in recipe.layout.groups), default=1)
        width = 3 * max(rows, cols, channels) + tables.TILE
        powers = len(self.coefficients)
        farthest = min(
            (
                _REACH[torch.promote_types(w.tensor.dtype, torch.float32)]
                / max(rates[w.entry] * abs(w.exponent), 1e-300)
                for w in recipe.writes
            ),
            default=math.inf,
        )
        products = [self.products.index(x * a) for x in self.exponents for a in self.coefficients]
        return tables.Recipe(
            scales=self.scales,
            cycles=recipe.cycles,
            threads=self.threads,
            exact=int(recipe.exact),
            power_count=powers,
            product_count=len(self.products),
            p=recipe.p,
            farthest=farthest,
            coefficients=self._doubles(self.coefficients),
            products=self._doubles(self.products),
            product=self._hold(torch.tensor([*products, 0])),
            e=self._room(powers * (self.scales + 1)),
            d=self._room(len(self.products) * (self.scales + 1)),
            steps=self._room(self.scales + 1),
            totals=self._room(len(blocks) * self.threads),
            scratch=self._room(width * self.threads),
            scratch_width=width,
            forms=forms,
            sources=self._table(tables.Source, self.sources),
            blocks=self._table(tables.Block, blocks),
            block_count=len(blocks),
            passes=self._table(tables.Pass, passes),
            touches=self._table(tables.Touch, touches),
            groups=self._table(tables.Group, groups),
            batches=self._table(tables.Batch, batches),
            batch_count=len(batches),
            checks=self._table(tables.Check, checks),
            check_count=len(checks),
            scalers=self._table(tables.Scaler, scalers),
            scaler_count=len(scalers),
            writes=self._table(tables.Write, writes),
            write_count=len(writes),
        )

    # ---- memory

    def _hold(self, tensor: Tensor) -> int:
        self.keep.append(tensor)
        return tensor.data_ptr()

    def _room(self, size: int, dtype: torch.dtype = torch.float64) -> int:
        return self._hold(torch.zeros(max(1, size), dtype=dtype))

    def _doubles(self, values: Iterable[float]) -> int:
        return self._hold(torch.tensor([*values, 0.0], dtype=torch.float64))

    def _table(self, struct: type[ctypes.Structure], rows: list[Row]) -> int:
        table = (struct * max(1, len(rows)))(*(struct(**row) for row in rows))
        self.keep.append(table)
        return ctypes.addressof(table)

    def _terms(self, terms: tuple[CellTerm, ...], length: int) -> Any:
        ids = [torch.where(t.ids < 0, self.scales, t.ids) for t in terms]
        first = [-1 if (start := first_of_run(line)) is None else start for line in ids]
        powers = [self.coefficients.index(t.coefficient) for t in terms]
        last = torch.zeros(1, dtype=torch.int64)
        return tables.Terms(
            count=len(terms),
            length=length,
            power=self._hold(torch.tensor([*powers, 0])),
            first=self._hold(torch.tensor([*first, 0])),
            ids=self._hold(torch.cat([*ids, last]).to(torch.int32)),
        )

    def _form(self, form: MatrixView) -> Row:
        return {
            "rows": form.rows,
            "cols": form.cols,
            "run": form.run,
            "row": self._terms(form.row, form.rows),
            "col": self._terms(form.col, form.cols),
        }

    def _source(self, entry: int, tensor: Tensor) -> int:
        axes = memory_order(tensor)
        if axes is None:
            raise Unsupported(f"memory with gaps (strides {tensor.stride()})")
        if (entry, axes) not in self.form_numbers:
            self.form_numbers[entry, axes] = len(self.forms)
            self.forms.append(make_view(self.recipe.layout.entries[entry], axes))
        self.keep.append(tensor)
        number = self.form_numbers[entry, axes]
        dtype = DTYPES[tensor.dtype]
        self.sources.append({"data": tensor.data_ptr(), "dtype": dtype, "form": number})
        return len(self.sources) - 1

    # ---- measure

    def _blocks(
        self, weights: list[int], rates: list[float], limits: list[float]
    ) -> tuple[list[Row], list[int]]:
        recipe = self.recipe
        split = {
            b.entry: number
            for number, b in enumerate(recipe.layout.blocks)
            if b.removed is not None
        }
        blocks, forms = [], []
        for block in recipe.layout.blocks:
            weight = recipe.weights[block.entry]
            wide = accumulation_dtype(weight.dtype, recipe.p, False) == torch.float64
            form = self.sources[weights[block.entry]]["form"]
            shape = self.forms[form]
            removed = picked = None
            if block.entry in split:
                numbers = cell_numbers(recipe.layout.entries[block.entry], shape)
                if block.removed is not None:
                    removed = torch.isin(numbers, block.removed).nonzero().reshape(-1)
                if block.picked is not None:
                    picked, form = self._picked(block, block.picked, numbers)
            sums = block.entry in split or recipe.p not in (1.0, 2.0, math.inf) or shape.run > 1
            dtype = torch.float64 if wide else torch.float32
            size = self.forms[form].rows * self.forms[form].cols
            blocks.append(
                {
                    "source": weights[block.entry],
                    "form": form,
                    "sums": self._room(size, dtype) if sums else None,
                    "wide": int(wide),
                    "weight": recipe.c ** (-recipe.power * block.depth),
                    "removed_count": 0 if removed is None else len(removed),
                    "picked_count": 0 if picked is None else len(picked),
                    "picked_from": split.get(block.entry, 0),
                    "removed": None if removed is None else self._hold(removed),
                    "picked": None if picked is None else self._hold(picked),
                    "rate": rates[block.entry],
                    "limit": limits[block.entry],
                }
            )
            forms.append(form)
        return blocks, forms

    def _picked(self, block: Block, cells: Tensor, numbers: Tensor) -> tuple[Tensor, int]:
        """Positions of the picked cells, and the number of their form: one row."""
        place = torch.full((int(numbers.max()) + 1,), -1)
        place[cells] = torch.arange(len(cells))
        place = place[numbers]
        positions = (place >= 0).nonzero().reshape(-1)
        terms = tuple(
            CellTerm(term.coefficient, term.ids[place[positions]]) for term in block.parts[0].terms
        )
        self.forms.append(MatrixView((), 1, len(positions), 1, (), terms))
        return positions, len(self.forms) - 1

    # ---- solve

    def _turns(self, forms: list[int]) -> tuple[Any, ...]:
        """Passes, touches, groups and batches, and the blocks that some pass reads."""
        passes: list[Row] = []
        touches: list[Row] = []
        groups: list[Row] = []
        batches: list[Row] = []
        met: set[int] = set()
        by_group = self._touches(forms)
        for turn in self.recipe.layout.batches:
            numbers: dict[tuple[int, int], int] = {}
            begin, first_group, seen = len(passes), len(groups), set(met)
            plain = True
            for number in turn:
                group = self.recipe.layout.groups[number]
                if not group.positive or not group.negative:
                    continue
                if len(group.positive) + len(group.negative) > tables.MOST_SIDES:
                    raise Unsupported("more kinds of exponents than the native backend holds")
                sides = [*group.positive, *group.negative]
                first_touch = len(touches)
                for block, over_rows, coefficient, positions, channels in by_group[number]:
                    if (block, over_rows) not in numbers:
                        numbers[block, over_rows] = len(passes)
                        form = self.forms[forms[block]]
                        size = form.cols * self.threads if over_rows else form.rows
                        passes.append(
                            {
                                "block": block,
                                "over_rows": over_rows,
                                "first": int(block not in seen),
                                "out": self._room(size),
                            }
                        )
                        met.add(block)
                    touches.append(self._touch(
                        numbers[block, over_rows], sides.index(coefficient), positions, channels
                    ))  # fmt: skip
                    form = self.forms[forms[block]]
                    plain &= len(form.col if over_rows else form.row) == 1
                groups.append(self._group(group, first_touch, len(touches), sides))
            if len(groups) > first_group:
                alone = plain and len(groups) == first_group + 1
                batches.append(
                    {
                        "pass_begin": begin,
                        "pass_end": len(passes),
                        "group_begin": first_group,
                        "group_end": len(groups),
                        "alone": int(alone),
                    }
                )
        return passes, touches, groups, batches, met

    def _touches(self, forms: list[int]) -> list[list[tuple[int, int, float, Tensor, Tensor]]]:
        """By group: (block, over rows, coefficient, positions, channels)."""
        found: list[list[tuple[int, int, float, Tensor, Tensor]]] = [
            [] for _ in self.recipe.layout.groups
        ]
        for block, number in enumerate(forms):
            form = self.forms[number]
            for over_rows, terms in enumerate((form.row, form.col)):
                for term in terms:
                    owners = self.owner[term.ids]
                    for group in torch.unique(owners[owners >= 0]).tolist():
                        positions = (owners == group).nonzero().reshape(-1)
                        channels = term.ids[positions] - self.recipe.layout.groups[group].start
                        found[group].append(
                            (block, over_rows, term.coefficient, positions, channels)
                        )
        return found

    def _touch(self, number: int, side: int, positions: Tensor, channels: Tensor) -> Row:
        position, channel = first_of_run(positions), first_of_run(channels)
        touch: Row = {"pass_": number, "side": side, "count": len(positions)}
        if position is not None and channel is not None:
            return {**touch, "position": position, "channel": channel}
        return {
            **touch,
            "positions": self._hold(positions.to(torch.int32)),
            "channels": self._hold(channels.to(torch.int32)),
        }

    def _group(self, group: GroupLayout, first: int, last: int, sides: list[float]) -> Row:
        return {
            "start": group.start,
            "channels": group.channels,
            "touch_begin": first,
            "touch_end": last,
            "positive": len(group.positive),
            "negative": len(group.negative),
            "symmetric": int(group.symmetric),
            "damping": float(group.damping),
            "coefficients": self._doubles(sides),
            "sides": self._room(len(sides) * group.channels),
        }

    # ---- apply

    def _writes(self) -> tuple[list[Row], list[Row]]:
        scalers: list[Row] = []
        numbers: dict[tuple[int, int, bool], int] = {}
        writes = []
        for write in self.recipe.writes:
            source = self._source(write.entry, write.tensor)
            scaler = self._scaler(write, source, scalers, numbers)
            writes.append({"source": source, "scaler": scaler})
        return scalers, writes

    def _scaler(
        self,
        write: Write,
        source: int,
        scalers: list[Row],
        numbers: dict[tuple[int, int, bool], int],
    ) -> int:
        form, wide = self.sources[source]["form"], write.tensor.dtype == torch.float64
        key = form, write.exponent, wide
        if key not in numbers:
            numbers[key] = len(scalers)
            shape = self.forms[form]
            row = self._room(shape.rows)
            col = self._room(shape.cols * shape.run, torch.float64 if wide else torch.float32)
            exponent = self.exponents.index(write.exponent)
            scalers.append(
                {"form": form, "exponent": exponent, "wide": int(wide), "row": row, "col": col}
            )
        return numbers[key]
