"""Files that are no sound weights: damaged, foreign, dangerous or missing."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from tests.support.checkpoint_files import FORMATS


class _Runs:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def _truncated(form: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = FORMATS[form](folder, {"a": torch.ones(100)})
        path.write_bytes(path.read_bytes()[:-200])
        return path

    return make


def _code(folder: Path) -> Path:
    torch.save({"a": torch.ones(2), "b": _Runs()}, folder / "code.pt")
    return folder / "code.pt"


def _legacy_code(folder: Path) -> Path:
    torch.save({"b": _Runs()}, folder / "code.pt", _use_new_zipfile_serialization=False)
    return folder / "code.pt"


def _pickle(folder: Path) -> Path:
    (folder / "a.pkl").write_bytes(pickle.dumps(_Runs()))
    return folder / "a.pkl"


def _module(folder: Path) -> Path:
    torch.save(nn.Linear(2, 2), folder / "module.pt")
    return folder / "module.pt"


def _saved(value: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(value, folder / "saved.pt")
        return folder / "saved.pt"

    return make


def _text(name: str, text: str = "") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return make


def _index(weight_map: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "in").mkdir()
        for place in ("in/a.safetensors", "outside.safetensors"):
            save_file({"a": torch.ones(2)}, folder / place)
        path = folder / "in" / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))
        return path

    return make


def _compressed(folder: Path) -> Path:
    torch.save({"a": torch.ones(2)}, folder / "a.pt")
    with zipfile.ZipFile(folder / "a.pt") as old, \
            zipfile.ZipFile(folder / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:  # fmt: skip
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return folder / "b.pt"


def _two(folder: Path) -> Path:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"a": torch.ones(2)}, folder / name)
    return folder


# What each is made by in a folder, and what is said of it.
BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "none.pt", "none.pt cannot be read: No such file"),
    "empty": (_text("e.pt"), "e.pt is no file of torch.save, or is damaged"),
    "empty safetensors": (_text("e.safetensors"), "is no sound safetensors file"),
    "text": (_text("a.pt", "hello world"), "a.pt is no file of torch.save, or is damaged"),
    "cut safetensors": (_truncated("safetensors"), "is no sound safetensors file: .*"),
    "cut zip": (_truncated("zipped"), "zipped.pt (cannot be read as|is no) a? ?file of torch.save"),
    "cut legacy": (_truncated("legacy"), "legacy.pt cannot be read as a file of torch.save"),
    "code": (_code, r"code.pt would run code .*\((posix|nt)\.system\)"),
    "legacy code": (_legacy_code, r"code.pt would run code .*\((posix|nt)\.system\)"),
    "bare pickle": (_pickle, "a.pkl is no file of torch.save"),
    "module": (_module, r"would run code .*\(torch\.nn\.modules\.linear\.Linear\)"),
    "list": (_saved([torch.ones(2)]), "holds a list, not a state_dict"),
    "tensor": (_saved(torch.ones(2)), "holds a tensor, not a state_dict"),
    "no tensors": (_saved({"state_dict": {}}), "holds no tensors"),
    "numbers": (_saved({"a": 1}), "its entry 'a' is a int, not a tensor"),
    "deep": (_saved({"net": {"a": torch.ones(1)}}), "its entry 'net' is a dict, not a tensor"),
    "sparse": (_saved({"a": torch.eye(3).to_sparse()}), "cannot be read as|not a plain dense"),
    "compressed": (_compressed, "b.pt (is compressed|cannot be read)"),
    "no weights": (lambda folder: folder, "is a folder without weights"),
    "two weights": (_two, "several weights: name one of a.safetensors, b.safetensors"),
    "no index": (_text("a.json", "{}"), "a.json is no index of shards"),
    "no json": (_text("a.json", "{"), "a.json is no index: it is not JSON"),
    "list index": (_text("a.json", "[]"), "a.json is no index of shards"),
    "outside": (_index({"a": "../outside.safetensors"}), "which is no file in its folder"),
    "root": (_index({"a": "/etc/passwd"}), "'/etc/passwd', which is no file in its folder"),
    "number": (_index({"a": 3}), "names 3, which is no file in its folder"),
    "here": (_index({"a": "."}), "names '.', which is no file in its folder"),
    "no shard": (_index({"a": "b.safetensors"}), "b.safetensors cannot be read: No such file"),
    "other tensors": (_index({"b": "a.safetensors"}), "disagree on which tensors it holds: a, b"),
}  # fmt: skip
