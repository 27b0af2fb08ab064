"""Safetensors files: a header of JSON that says where each tensor lies, then the bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch

from enorm_fx.checkpoints.mapped import MappedFile, Place, View
from enorm_fx.errors import CheckpointError

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


class SafetensorsFile(MappedFile):
    """A safetensors file. Its metadata are a part of the header, which is copied as it is."""

    others: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where the file is no sound safetensors file."""
        _check(path)
        super().__init__(path, _views(path))


def _check(path: Path) -> None:
    """The library that defines the format says whether the file keeps to it."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise CheckpointError(
            f"{path} needs safetensors to be read: pip install 'enorm-fx[safetensors]'"
        ) from error
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no sound safetensors file: {error}") from error


def _views(path: Path) -> dict[str, View]:
    """What the header says of each tensor."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    views = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = getattr(torch, _DTYPES.get(entry["dtype"], ""), None)
        if dtype is None:
            raise CheckpointError(
                f"'{name}' in {path} has the type {entry['dtype']}, which torch "
                f"{torch.__version__} does not know"
            )
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        place = Place(8 + length + start, stop - start)
        views[name] = View(place, dtype, shape, _contiguous(shape))
    return views


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor whose last axis is the fastest, without gaps."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return tuple(strides)
