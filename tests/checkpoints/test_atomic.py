"""An output is there complete, or not at all: after a kill at any moment and on a full disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from enorm_fx.checkpoints.checkpoint import copied, open_checkpoint
from enorm_fx.errors import CheckpointError
from tests.support.checkpoint_files import FORMATS, contents, read
from tests.support.killed import killed_at_every_stage, with_room_for


def _triple(tensor: Tensor) -> None:
    tensor.mul_(3)


def _copy(path: Path, output: Path) -> None:
    with copied(open_checkpoint(path), output, {"a": _triple}):
        pass


def _made(folder: Path, form: str) -> Path:
    torch.manual_seed(0)
    return FORMATS[form](
        folder, {"a": torch.randn(40, 30), "b": torch.randn(3), "c": torch.ones(2)}
    )


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_killed_at_any_stage_leaves_none_or_all(tmp_path: Path, form: str, older: bool) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    path, output = _made(folder, form), folder / "out"
    _copy(path, tmp_path / "wanted")
    before, wanted = contents(path), contents(tmp_path / "wanted")
    stages = []

    def start_anew() -> None:
        """As before the first run: no output, or an older one (a file, or an empty folder)."""
        for left in folder.iterdir():
            if left != path:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        if older:
            output.mkdir() if path.is_dir() else output.write_text("old")

    start_anew()
    for stage in killed_at_every_stage(lambda: _copy(path, output), folder):
        stages.append(stage.split()[0])
        assert contents(path) == before
        if output.exists():
            now = contents(output)
            complete = now == wanted or (form == "legacy" and _same(output, tmp_path / "wanted"))
            assert complete or (older and now in ({}, {"": b"old"})), stage
        else:
            assert not older or path.is_dir(), stage
        start_anew()
    assert {"open", "os.rename"} <= set(stages)
    assert _same(output, tmp_path / "wanted")


def _same(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same tensors (the legacy format numbers them at random)."""
    try:
        a, b = read(one), read(other)
    except Exception:  # whatever an incomplete file makes of its reader
        return False
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_may_not_grow_is_one_error_and_nothing_is_left(
    tmp_path: Path, form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = _made(tmp_path, form)
    before = sorted(tmp_path.iterdir())
    assert with_room_for(2000, lambda: _copy(path, tmp_path / "out")) == 1
    assert "out cannot be written: File too large" in capfd.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_is_one_error_and_nothing_is_left(tmp_path: Path, form: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        path = _made(tmp_path, form)
        with pytest.raises(CheckpointError, match="out cannot be written: No space left"):
            _copy(path, disk / "out")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_no_permission_is_one_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    path = _made(tmp_path, "safetensors")
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(CheckpointError, match="out cannot be written: Permission denied"):
        _copy(path, tmp_path / "closed" / "out")


def test_an_output_that_cannot_be_is_refused(tmp_path: Path) -> None:
    one, many = _made(tmp_path, "zipped"), _made(tmp_path, "sharded")
    other = _made(tmp_path, "safetensors")
    (tmp_path / "link").symlink_to(one)
    (tmp_path / "to").symlink_to(many)
    before = {**contents(tmp_path)}
    for path, output, message in (
        (one, one, "is the input"),
        (one, tmp_path / "link", "is the input"),
        (tmp_path / "link", one, "is the input"),
        (one, tmp_path / "sharded" / ".." / "zipped.pt", "is the input"),
        (many, many, "is the input"),
        (many, tmp_path / "to", "is the input"),
        (many, many / "out", "lies within the input"),
        (many / "model.safetensors.index.json", many, "is the input"),
        (one, many, "is a folder: name a file"),
        (many, one, "is a file: name a new folder"),
        (one, tmp_path / "no" / "out", "cannot be written: No such file .*make the folder"),
        (many, tmp_path / "no" / "out", "cannot be written: No such file .*make the folder"),
        (one, one / "out", "cannot be written: Not a directory"),
        (one, tmp_path / "out.safetensors", "a file of torch.save.* name the output with .pt, not"),
        (other, tmp_path / "out.pth", "name the output with .safetensors, not out.pth"),
        (one, tmp_path / ("x" * 300), "cannot be written: File name too long"),
    ):
        with pytest.raises(CheckpointError, match=message):
            _copy(path, output)
        assert contents(tmp_path) == before
