"""A copy of a checkpoint is the checkpoint, byte for byte, but for what was edited."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from enorm_fx.checkpoints.checkpoint import copied, open_checkpoint
from enorm_fx.errors import CheckpointError
from tests.support.checkpoint_files import FORMATS, contents, nested, read, safetensors, zipped


def weights() -> dict[str, Tensor]:
    """Every kind of tensor that a state_dict may hold."""
    torch.manual_seed(0)
    made = {
        "double": torch.randn(3, 4, dtype=torch.float64),
        "single": torch.randn(70, 3),
        "half": torch.randn(5).half(),
        "brain": torch.randn(2, 3, 4).bfloat16(),
        "whole": torch.arange(6),
        "flag": torch.tensor([True, False]),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    return {**made, "tied": made["single"]}


def double(tensor: Tensor) -> None:
    tensor.mul_(2)


@pytest.mark.parametrize("form", FORMATS)
def test_a_copy_without_edits_is_the_same_to_the_byte(tmp_path: Path, form: str) -> None:
    path = FORMATS[form](tmp_path, weights())
    before = contents(path)
    with copied(open_checkpoint(path), tmp_path / "out", {}):
        pass
    if form == "legacy":  # it is written anew, which numbers its storages
        assert read(tmp_path / "out").keys() == read(path).keys()
    else:
        assert contents(tmp_path / "out") == before
    assert contents(path) == before


@pytest.mark.parametrize("form", FORMATS)
def test_edits_and_nothing_else_change(tmp_path: Path, form: str) -> None:
    path = FORMATS[form](tmp_path, weights())
    before, old = contents(path), read(path)
    edited = [n for n in ("single", "brain", "last", "none", "scalar", "tied") if n in old]
    with copied(open_checkpoint(path), tmp_path / "out", {n: double for n in edited}) as copy:
        seen = {name: tensor.clone() for name, tensor in copy.tensors.items()}
        assert not (tmp_path / "out").exists()
    new = read(tmp_path / "out")
    assert list(new) == list(old)
    for name, tensor in old.items():
        wanted = 2 * tensor if name in edited else tensor
        for found in (new[name], seen[name]):
            assert torch.equal(found, wanted)
            assert found.dtype == tensor.dtype
            assert found.stride() == tensor.stride() or not found.numel()
    if "tied" in old:
        assert new["tied"].data_ptr() == new["single"].data_ptr()
    assert contents(path) == before
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "out"}


@pytest.mark.parametrize("form", ["zipped", "nested"])
def test_an_archive_has_the_checksums_of_its_new_data(tmp_path: Path, form: str) -> None:
    path = FORMATS[form](tmp_path, weights())
    with copied(open_checkpoint(path), tmp_path / "out", {"single": double, "half": double}):
        pass
    with zipfile.ZipFile(tmp_path / "out") as archive:
        assert archive.testzip() is None
    changed = [i for i, (a, b) in enumerate(zip(contents(path)[""], contents(tmp_path / "out")[""],
                                                strict=True)) if a != b]  # fmt: skip
    assert changed  # and yet most bytes are the same
    assert len(changed) < 4 * 4 + 70 * 3 * 4 + 5 * 2


def test_what_else_is_in_a_file_is_kept_and_named(tmp_path: Path) -> None:
    path = nested(tmp_path, weights())
    checkpoint = open_checkpoint(path)
    assert checkpoint.others == ("epoch", "note")
    with copied(checkpoint, tmp_path / "out", {"half": double}):
        pass
    loaded = torch.load(tmp_path / "out", weights_only=True)
    assert (loaded["epoch"], loaded["note"]) == (3, "x")


def test_a_folder_goes_along_but_for_other_weights(tmp_path: Path) -> None:
    path = FORMATS["sharded"](tmp_path, weights())
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.txt").write_text("a b")
    (path / ".git").mkdir()
    (path / ".git" / "HEAD").write_text("x")
    (path / "pytorch_model.bin").write_text("old")
    checkpoint = open_checkpoint(path)
    assert [p.name for p in checkpoint.left] == ["pytorch_model.bin"]
    with copied(checkpoint, tmp_path / "out", {}):
        pass
    wanted = {
        k: v for k, v in contents(path).items() if k not in (".git/HEAD", "pytorch_model.bin")
    }
    assert contents(tmp_path / "out") == wanted


def test_an_index_alone_takes_its_shards_with_it(tmp_path: Path) -> None:
    path = FORMATS["sharded"](tmp_path, weights())
    with copied(open_checkpoint(path / "model.safetensors.index.json"), tmp_path / "out", {}):
        pass
    wanted = {k: v for k, v in contents(path).items() if k != "config.json"}
    assert contents(tmp_path / "out") == wanted


@pytest.mark.parametrize("make", [safetensors, zipped])
def test_writing_into_an_open_tensor_changes_no_file(tmp_path: Path, make: object) -> None:
    path = make(tmp_path, weights())  # type: ignore[operator]
    before = contents(path)
    checkpoint = open_checkpoint(path)
    checkpoint.tensors["single"].zero_()
    assert contents(path) == before
    checkpoint.release()
    assert torch.equal(checkpoint.tensors["single"], weights()["single"])


def test_an_existing_file_is_replaced_and_a_full_folder_is_not(tmp_path: Path) -> None:
    path = safetensors(tmp_path, weights())
    (tmp_path / "out").write_text("old")
    with copied(open_checkpoint(path), tmp_path / "out", {}):
        assert (tmp_path / "out").read_text() == "old"
    assert contents(tmp_path / "out") == contents(path)
    shards = open_checkpoint(FORMATS["sharded"](tmp_path, weights()))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    with pytest.raises(CheckpointError, match="full is not empty"), \
            copied(shards, tmp_path / "full", {}):  # fmt: skip
        pass
    (tmp_path / "empty").mkdir()
    with copied(shards, tmp_path / "empty", {}):
        pass
    assert contents(tmp_path / "empty") == contents(shards.path)


def test_an_error_in_the_block_leaves_no_output(tmp_path: Path) -> None:
    for form, make in FORMATS.items():
        checkpoint = open_checkpoint(make(tmp_path, weights()))
        before = sorted(tmp_path.iterdir())
        with pytest.raises(KeyError, match=form), \
                copied(checkpoint, tmp_path / "out", {"half": double}):  # fmt: skip
            raise KeyError(form)
        assert sorted(tmp_path.iterdir()) == before
