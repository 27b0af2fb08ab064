"""What cannot be read is one clear error: damaged, foreign, dangerous or missing files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from enorm_fx.checkpoints.checkpoint import open_checkpoint
from enorm_fx.errors import CheckpointError
from tests.support.broken_files import BROKEN
from tests.support.checkpoint_files import FORMATS


@pytest.mark.parametrize("case", BROKEN)
def test_it_is_one_error_that_says_what_is_wrong(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = BROKEN[case]
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
