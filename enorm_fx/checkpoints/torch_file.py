"""Files of torch.save: today's, which are zip archives and are mapped, and those before torch 1.6.

Both are loaded with weights_only=True: a pickle that would run code is refused.
"""

from __future__ import annotations

import copy
import re
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from enorm_fx.checkpoints.mapped import MappedFile, Place, View
from enorm_fx.checkpoints.weight_file import Edit
from enorm_fx.errors import CheckpointError

_INSIDE = ("state_dict", "model")  # keys under which people keep a state_dict
_LOCAL, _CENTRAL = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I")
_DESCRIPTOR = b"PK\x07\x08"
_STREAMED = 8  # flag of a record whose checksum follows its data


def open_torch_file(path: Path) -> ZipFile | LegacyFile:
    """A file of torch.save. Raises CheckpointError where it holds no state_dict, or code."""
    return ZipFile(path) if zipfile.is_zipfile(path) else LegacyFile(path)


class ZipFile(MappedFile):
    """A zip archive with a pickle and one uncompressed record for each storage."""

    def __init__(self, path: Path) -> None:
        # Fake tensors: nothing of the data is read, and each storage says where it lies.
        with FakeTensorMode():
            tensors, self.others = _state_dict(_load(path), path)
        self._records = _records(path)
        super().__init__(path, {name: _view(name, t, path) for name, t in tensors.items()})
        self._checksums: dict[Place, int] = {}

    def write(self, target: BinaryIO, edits: Mapping[str, Edit]) -> None:
        """As for every mapped file; then the archive's checksums are set to the new data's."""
        super().write(target, edits)
        for place, checksum in self._checksums.items():
            for at in self._records[place.start]:
                target.seek(at)
                target.write(struct.pack("<I", checksum))
        self._checksums.clear()

    def wrote(self, place: Place, new: bytearray) -> None:
        """Remember the checksum of the new bytes."""
        self._checksums[place] = zlib.crc32(new)


class LegacyFile:
    """The format before torch 1.6, which cannot be mapped: it is in memory, and once more when
    it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._loaded = _load(path)
        self.tensors, self.others = _state_dict(self._loaded, path)

    def release(self) -> None:
        """Nothing can be given back."""

    def write(self, target: BinaryIO, edits: Mapping[str, Edit]) -> None:
        """Write a copy in which the tensors are edited. Views of one storage stay such."""
        edited = copy.deepcopy(self._loaded)
        tensors, _ = _state_dict(edited, self.path)
        done = set()
        for name, edit in edits.items():
            view = (tensors[name].untyped_storage()._cdata, *_geometry(tensors[name]))
            if view not in done:
                done.add(view)
                edit(tensors[name].detach())
        stream: Any = _Stream(target)
        torch.save(edited, stream, _use_new_zipfile_serialization=False)


class _Stream:
    """A file without a number: torch writes into it by its method, whose errors say why."""

    def __init__(self, target: BinaryIO) -> None:
        self.write, self.flush = target.write, target.flush


def _load(path: Path) -> Any:
    """The unpickled object; its tensors are on the CPU."""
    try:
        with warnings.catch_warnings():  # of torch's own future, and of pickles that it refuses
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path} cannot be read as a file of torch.save: {reason}") from error
    # A damaged file may break any step of unpickling.
    except (UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError,
            AssertionError, OverflowError, MemoryError, struct.error) as error:  # fmt: skip
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise CheckpointError(f"{path} is no file of torch.save, or is damaged") from error
        raise CheckpointError(
            f"{path} would run code or make objects of its own when loaded ({found[1]}): only "
            "tensors and plain containers are read. Save the model's state_dict alone"
        ) from error


def _state_dict(loaded: Any, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a bare state_dict, or of one under a usual key, and what else there is."""
    if not isinstance(loaded, Mapping):
        kind = "tensor" if isinstance(loaded, Tensor) else type(loaded).__name__
        raise CheckpointError(f"{path} holds a {kind}, not a state_dict")
    inside = next((key for key in _INSIDE if isinstance(loaded.get(key), Mapping)), None)
    found = loaded if inside is None else loaded[inside]
    others = tuple(str(key) for key in loaded if key != inside) if inside is not None else ()
    tensors = {}
    for name, value in found.items():
        if isinstance(value, Tensor):
            tensors[str(name)] = value
        elif not str(name).endswith("_extra_state"):
            raise CheckpointError(
                f"{path} holds no state_dict: its entry '{name}' is a {type(value).__name__}, not "
                "a tensor"
            )
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return tensors, others


def _geometry(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _view(name: str, tensor: Tensor, path: Path) -> View:
    """Where a fake tensor's data lie."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise CheckpointError(f"'{name}' in {path} is {tensor.layout}, not a plain dense tensor")
    storage = tensor.untyped_storage()
    place = Place(storage._checkpoint_offset or 0, storage.nbytes())
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    return View(place, tensor.dtype, shape, stride, int(tensor.storage_offset()))


def _records(path: Path) -> dict[int, tuple[int, int]]:
    """For each record, by where its data start: the two places of its checksum."""
    records = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        central = archive.start_dir
        for info in archive.infolist():
            if info.filename.endswith("/byteorder") and archive.read(info) != _byteorder():
                raise CheckpointError(f"{path} was saved on a machine of the other byte order")
            if info.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path} is compressed, which torch.save never does")
            file.seek(info.header_offset)
            header = _LOCAL.unpack(file.read(_LOCAL.size))
            start = info.header_offset + _LOCAL.size + sum(header[-2:])
            checksum = info.header_offset + 14
            if info.flag_bits & _STREAMED:
                file.seek(start + info.file_size)
                checksum = start + info.file_size + 4 * (file.read(4) == _DESCRIPTOR)
            records[start] = (checksum, central + 16)
            file.seek(central)
            central += _CENTRAL.size + sum(_CENTRAL.unpack(file.read(_CENTRAL.size))[10:13])
    return records


def _byteorder() -> bytes:
    return sys.byteorder.encode()
