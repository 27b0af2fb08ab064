"""What cannot be read is one clear error: damaged, foreign, dangerous or missing files."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from enorm_fx.checkpoints.checkpoint import open_checkpoint
from enorm_fx.errors import CheckpointError
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


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
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


@pytest.mark.parametrize("case", CASES)
def test_it_is_one_error_that_says_what_is_wrong(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = CASES[case]
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(path)
    assert str(path.parent) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = FORMATS["safetensors"](tmp_path, {"a": torch.ones(2)})
    path.chmod(0)
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    with pytest.raises(CheckpointError, match=r"one.safetensors cannot be read: Permission denied"):
        open_checkpoint(path)


@pytest.mark.parametrize("cut", range(0, 1000, 37))
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, cut: int) -> None:
    for form in ("safetensors", "zipped", "legacy"):
        path = FORMATS[form](tmp_path, {"a": torch.ones(100), "b": torch.ones(3)})
        path.write_bytes(path.read_bytes()[: min(cut, path.stat().st_size - 1)])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
