"""Files of weights in every format, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = Mapping[str, Tensor]


def safetensors(folder: Path, weights: Weights) -> Path:
    """One safetensors file with metadata."""
    save_file(_untied(weights), folder / "one.safetensors", metadata={"format": "pt", "by": "me"})
    return folder / "one.safetensors"


def zipped(folder: Path, weights: Weights) -> Path:
    """A file of torch.save with a bare state_dict."""
    torch.save(dict(weights), folder / "zipped.pt")
    return folder / "zipped.pt"


def nested(folder: Path, weights: Weights) -> Path:
    """A file of torch.save with other things beside the state_dict."""
    torch.save({"epoch": 3, "state_dict": dict(weights), "note": "x"}, folder / "nested.pth")
    return folder / "nested.pth"


def legacy(folder: Path, weights: Weights) -> Path:
    """The format before torch 1.6."""
    path = folder / "legacy.pt"
    torch.save({"model": dict(weights)}, path, _use_new_zipfile_serialization=False)
    return path


def sharded(folder: Path, weights: Weights) -> Path:
    """A folder with an index of two safetensors shards, and a configuration."""
    made = folder / "sharded"
    made.mkdir()
    names = list(_untied(weights))
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(places.values())):
        save_file({n: weights[n].contiguous() for n in names if places[n] == shard}, made / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    (made / "config.json").write_text("{}")
    return made


FORMATS: dict[str, Callable[[Path, Weights], Path]] = {
    f.__name__: f for f in (safetensors, zipped, nested, legacy, sharded)
}


def read(path: Path) -> dict[str, Tensor]:
    """The tensors, read by the libraries that define the formats alone."""
    if path.is_dir():
        index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
        return {name: load_file(path / shard)[name] for name, shard in index.items()}
    if path.read_bytes()[8:9] == b"{":
        return load_file(path)
    loaded = torch.load(path, weights_only=True)
    return dict(loaded.get("state_dict") or loaded.get("model") or loaded)


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a checkpoint, by its path in it."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def _untied(weights: Weights) -> dict[str, Tensor]:
    """Safetensors takes no shared memory: of tied names the first one."""
    kept: dict[int, str] = {}
    for name, tensor in weights.items():
        kept.setdefault(tensor.data_ptr() if tensor.numel() else -len(kept) - 1, name)
    return {name: weights[name].contiguous() for name in kept.values()}
