"""A file in memory without being read: pages come when they are touched, and can be given back."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from enorm_fx.checkpoints.weight_file import CHUNK, Edit


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where the storage of a tensor lies in its file, in bytes."""

    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor in a file: its place, and how it looks at that storage (offset in entries)."""

    place: Place
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    def of(self, raw: Tensor) -> Tensor:
        """The tensor over raw, the bytes of its place."""
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(raw.untyped_storage(), self.offset, self.shape, self.stride)


class MappedFile:
    """A file whose tensors are views of its memory map. Tensors at one place share a storage.

    The map is private: whoever writes into a tensor changes memory of his own, never the file.
    """

    def __init__(self, path: Path, views: Mapping[str, View]) -> None:
        self.path, self.views = path, dict(views)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        raw: dict[Place, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, view in self.views.items():
            if view.place not in raw:
                raw[view.place] = _raw(self._map, view.place)
            self.tensors[name] = view.of(raw[view.place])

    def release(self) -> None:
        """Give the pages back that were read, and forget what was written into tensors."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def edited(self, edits: Mapping[str, Edit]) -> dict[Place, list[tuple[View, Edit]]]:
        """The edits by place, in the order of the file; several names of one view have one edit."""
        by_place: dict[Place, dict[View, Edit]] = {}
        for name, edit in edits.items():
            view = self.views[name]
            by_place.setdefault(view.place, {}).setdefault(view, edit)
        return {place: list(by_place[place].items()) for place in sorted(by_place)}

    def bytes_after(self, place: Place, edits: list[tuple[View, Edit]]) -> bytearray:
        """The bytes of a place after its edits; the map keeps the old ones."""
        out = bytearray(place.nbytes)
        with memoryview(self._map) as old, memoryview(out) as new:
            new[:] = old[place.start : place.start + place.nbytes]
        if out:
            raw = torch.frombuffer(out, dtype=torch.uint8)
            for view, edit in edits:
                edit(view.of(raw))
        return out

    def copy_until(self, start: int, stop: int, target: BinaryIO) -> None:
        """Copy the file's bytes from start to stop, a piece at a time."""
        with memoryview(self._map) as old:
            for at in range(start, stop, CHUNK):
                target.write(old[at : min(at + CHUNK, stop)])

    def write(self, target: BinaryIO, edits: Mapping[str, Edit]) -> None:
        """Write the file with the edits made: every other byte is the input's."""
        at = 0
        for place, changes in self.edited(edits).items():
            self.copy_until(at, place.start, target)
            new = self.bytes_after(place, changes)
            target.write(new)
            at = place.start + place.nbytes
            self.wrote(place, new)
            self.release()
        self.copy_until(at, len(self._map), target)
        self.release()

    def wrote(self, place: Place, new: bytearray) -> None:
        """A place has got new bytes: what a format with checksums must know."""


def _raw(memory: mmap.mmap, place: Place) -> Tensor:
    """The bytes of a place as a tensor (nbytes,) that keeps the map alive."""
    if not place.nbytes:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(memory, dtype=torch.uint8, count=place.nbytes, offset=place.start)
