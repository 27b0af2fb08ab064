"""A model's weights on disk: one file, shards with an index, or a folder with either."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from torch import Tensor

from enorm_fx.checkpoints.atomic import new_file, new_folder, writing
from enorm_fx.checkpoints.safetensors_file import SafetensorsFile
from enorm_fx.checkpoints.torch_file import open_torch_file
from enorm_fx.checkpoints.weight_file import Edit, WeightFile
from enorm_fx.errors import CheckpointError

_USUAL = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_INDEX = ".index.json"
_OTHER_WEIGHTS = (".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".tflite", ".ot")


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """Named tensors in one or several files.

    path:    what was opened; its copy is a folder if it is a folder or an index, else a file.
    root:    the folder that paths in the copy are relative to.
    files:   those with weights.
    tensors: all of them by name; tied ones share their storage. Not to be written to.
    along:   other files that a copy gets as well: the index, configuration, tokenizer.
    left:    files that a copy does not get: the same weights in another format.
    """

    path: Path
    root: Path
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, Tensor]
    along: tuple[Path, ...] = ()
    left: tuple[Path, ...] = ()

    @property
    def is_folder(self) -> bool:
        """Whether a copy is a folder."""
        return self.path.is_dir() or self.path.suffix == ".json"

    @property
    def others(self) -> tuple[str, ...]:
        """What is in the files besides the model's weights, and is copied as it is."""
        return tuple(dict.fromkeys(name for file in self.files for name in file.others))

    def release(self) -> None:
        """Give memory back that can be read again."""
        for file in self.files:
            file.release()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open weights without reading them.

    path: a safetensors file, a file of torch.save with a state_dict (bare, or under "state_dict"
        or "model"), the index of sharded ones, or a folder with one of these.

    Raises CheckpointError where there is none, it is damaged, holds code or cannot be read.
    """
    with _reading(path):
        if path.is_dir():
            return _open_folder(path)
        if path.suffix == ".json":
            return _open_index(path)
        file = _open_file(path)
        return Checkpoint(path, path.parent, (file,), file.tensors)


@contextmanager
def copied(checkpoint: Checkpoint, output: Path, edits: Mapping[str, Edit]) -> Iterator[Checkpoint]:
    """A copy of a checkpoint with some tensors edited, which appears at `output` when the block
    ends without an error. The block is given the copy, complete and synced, to look at.

    edits: by name of a tensor. Of names that share a tensor one is enough.

    Raises CheckpointError where `output` is the checkpoint, lies within its folder or cannot be
    written; nothing is left behind then.
    """
    check_output(checkpoint, output)
    make = new_folder if checkpoint.is_folder else new_file
    with make(output) as target:
        with writing(output):
            for file in checkpoint.files:
                own = {name: edit for name, edit in edits.items() if name in file.tensors}
                with _created(_under(target, file.path, checkpoint)) as stream:
                    file.write(stream, own)
            for path in checkpoint.along:
                with path.open("rb") as source, _created(_under(target, path, checkpoint)) as copy:
                    shutil.copyfileobj(source, copy)
        yield open_checkpoint(_opened_again(checkpoint, target))


def _opened_again(checkpoint: Checkpoint, target: Path) -> Path:
    if checkpoint.path.suffix == ".json":
        return target / checkpoint.path.name
    return target


def _under(target: Path, path: Path, checkpoint: Checkpoint) -> Path:
    """Where a file of the checkpoint goes; in a folder, its own folder is there."""
    if not checkpoint.is_folder:
        return target
    goes = target / path.relative_to(checkpoint.root)
    goes.parent.mkdir(parents=True, exist_ok=True)
    return goes


@contextmanager
def _created(path: Path) -> Iterator[BinaryIO]:
    """A new file that is on the disk when the block ends."""
    with path.open("xb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def check_output(checkpoint: Checkpoint, output: Path) -> None:
    """See that a copy may be at `output`: the input is never written, nor copied into itself, and
    a file is named as what it will hold.

    Raises CheckpointError.
    """
    source = checkpoint.root if checkpoint.is_folder else checkpoint.path
    with writing(output):
        out, inside = output.resolve(), source.resolve()
        if out == inside or (output.exists() and output.samefile(source)):
            raise CheckpointError(f"the output {output} is the input: it is never overwritten")
    if checkpoint.is_folder:
        if inside in out.parents:
            raise CheckpointError(f"the output {output} lies within the input {source}")
        return
    held = isinstance(checkpoint.files[0], SafetensorsFile)
    if output.suffix in _WEIGHTS and held != (output.suffix == ".safetensors"):
        kind = "a file of safetensors" if held else "a file of torch.save"
        ending = source.suffix if source.suffix in _WEIGHTS else ".safetensors" if held else ".pt"
        raise CheckpointError(
            f"{source} is {kind}, and so is what is written: name the output with {ending}, "
            f"not {output.name}"
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What the system refuses in this block is a CheckpointError that names the path."""
    try:
        yield
    except OSError as error:
        named = error.filename or path
        raise CheckpointError(f"{named} cannot be read: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _open_file(path: Path) -> WeightFile:
    """A single file, by what is in it."""
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return SafetensorsFile(path)
    return open_torch_file(path)


def _open_index(path: Path) -> Checkpoint:
    """Shards, and where the index says each tensor is."""
    places = _read_index(path)
    files = tuple(_open_file(path.parent / name) for name in dict.fromkeys(places.values()))
    tensors: dict[str, Tensor] = {}
    for file in files:
        name = file.path.relative_to(path.parent).as_posix()
        listed = {tensor for tensor, shard in places.items() if shard == name}
        if listed != file.tensors.keys():
            odd = sorted(listed.symmetric_difference(file.tensors))
            raise CheckpointError(
                f"{path} and {name} disagree on which tensors it holds: {', '.join(odd[:3])}"
            )
        tensors.update(file.tensors)
    return Checkpoint(path, path.parent, files, tensors, along=(path,))


def _read_index(path: Path) -> dict[str, str]:
    """Name of a tensor -> relative path of its shard, which is inside the index's folder."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no index: it is not JSON ({error})") from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path} is no index of shards: it has no weight_map")
    for shard in places.values():
        parts = PurePosixPath(shard).parts if isinstance(shard, str) else ()
        if not parts or ".." in parts or "\\" in shard or Path(shard).is_absolute():
            raise CheckpointError(f"{path} names {shard!r}, which is no file in its folder")
    return {str(name): PurePosixPath(shard).as_posix() for name, shard in places.items()}


def _open_folder(path: Path) -> Checkpoint:
    """The weights in a folder, and what else belongs to the model."""
    found = open_checkpoint(_weights_in(path))
    taken = {file.path for file in found.files}
    along, left = list(found.along), list[Path]()
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for file in (Path(folder) / name for name in sorted(names)):
            if file.name.startswith(".") or file in (*taken, *along) or not file.is_file():
                continue
            another = file.name.endswith((*_WEIGHTS, *_OTHER_WEIGHTS, _INDEX))
            (left if another else along).append(file)
    return Checkpoint(path, path, found.files, found.tensors, tuple(along), tuple(left))


def _weights_in(folder: Path) -> Path:
    """The index or the file of weights in a folder: one of the usual names, or the only one."""
    for name in _USUAL:
        if (folder / name).is_file():
            return folder / name
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for endings in ((_INDEX,), _WEIGHTS):
        found = [name for name in names if name.endswith(endings)]
        if len(found) > 1:
            raise CheckpointError(f"{folder} holds several weights: name one of {', '.join(found)}")
        if found:
            return folder / found[0]
    raise CheckpointError(f"{folder} is a folder without weights: no {' or '.join(_WEIGHTS)} in it")
