"""The training benchmark's data sets: readers that check what they read, and augmentation."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import data
from enorm_fx.errors import ArgumentError

CPU = torch.device("cpu")


def _idx(values: Tensor) -> bytes:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + bytes(values.flatten().tolist())


@pytest.mark.parametrize("shape", [(7,), (3, 4, 5)])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_round_trip(tmp_path: Path, shape: tuple[int, ...], zipped: bool) -> None:
    values = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).byte()
    content = _idx(values)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
    read = data.read_idx(path)
    assert read.dtype == torch.uint8
    assert torch.equal(read, values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no idx file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x00", "starts with 00 00 0d 01, not with 00 00 08"),
        (b"\x00\x00\x08\x02\x00\x00", "ends within its idx header"),
        (_idx(torch.arange(6).byte())[:-1], r"announces shape \(6,\), 6 bytes, but holds 5"),
        (_idx(torch.arange(6).byte()) + b"x", "6 bytes, but holds 7"),
        (_idx(torch.zeros(0).byte()), "0 bytes, but holds 0"),
        (gzip.compress(b"long enough to be cut", mtime=0)[:-6], "damaged gzip"),
    ],
)
def test_idx_refuses_what_it_cannot_read(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match=message):
        data.read_idx(path)


@pytest.fixture
def fashion_folder(tmp_path: Path) -> Path:
    """Twelve training and six test images of 28x28, in the files' own format."""
    generator = torch.Generator().manual_seed(1)
    for part, count in (("train", 12), ("t10k", 6)):
        images = torch.randint(256, (count, 28, 28), generator=generator).byte()
        labels = (torch.arange(count) % 10).byte()
        name = f"{part}-images-idx3-ubyte.gz"
        (tmp_path / name).write_bytes(gzip.compress(_idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(_idx(labels))
    return tmp_path


def test_fashion_mnist_from_a_folder(fashion_folder: Path) -> None:
    loaded = data.load("fashion-mnist", fashion_folder, CPU)
    assert loaded.train_images.shape == (12, 1, 28, 28)
    assert loaded.test_images.shape == (6, 1, 28, 28)
    assert loaded.train_labels.dtype == torch.int64
    assert (loaded.classes, loaded.augmented) == (10, False)
    assert loaded.train_images.mean().item() == pytest.approx(0, abs=1e-5)
    assert loaded.train_images.std().item() == pytest.approx(1, abs=1e-5)


def test_fashion_mnist_names_the_file_that_is_missing(fashion_folder: Path) -> None:
    (fashion_folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ArgumentError, match=r"neither t10k-labels-idx1-ubyte nor t10k-labels"):
        data.load("fashion-mnist", fashion_folder, CPU)


def test_digits_are_all_there_and_normalized_by_the_training_images() -> None:
    loaded = data.load("digits", None, CPU)
    assert loaded.train_images.shape == (1437, 1, 8, 8)
    assert loaded.test_images.shape == (360, 1, 8, 8)
    assert loaded.train_images.mean().item() == pytest.approx(0, abs=1e-5)
    assert loaded.test_images.mean().abs().item() > 1e-5
    counts = loaded.test_labels.bincount()
    assert len(counts) == 10
    assert counts.max() - counts.min() <= 3, "classes should be kept in proportion"


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    """CIFAR10 with four images a batch, in the files' own format: pickles with keys of bytes."""
    np = pytest.importorskip("numpy")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for place, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        images = (np.arange(4 * 3072, dtype=np.int64) + place) % 251
        batch = {
            b"batch_label": name.encode(),
            b"labels": [(2 * place + n) % 10 for n in range(4)],
            b"data": images.astype(np.uint8).reshape(4, 3072),
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return tmp_path


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifar10_from_a_folder(cifar_folder: Path, inner: str) -> None:
    loaded = data.load("cifar10", cifar_folder / inner, CPU)
    assert loaded.train_images.shape == (20, 3, 32, 32)
    assert loaded.test_images.shape == (4, 3, 32, 32)
    assert loaded.train_labels[:6].tolist() == [0, 1, 2, 3, 2, 3]
    assert (loaded.classes, loaded.augmented) == (10, True)
    torch.testing.assert_close(loaded.train_images.mean((0, 2, 3)), torch.zeros(3))
    read, _ = data.read_cifar_batch(cifar_folder / "cifar-10-batches-py" / "data_batch_1")
    assert read[0].flatten().tolist() == [number % 251 for number in range(3072)]


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("a-pickle-ran-code"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no batch of CIFAR10"),
        (pickle.dumps([1]), "it has no data and labels"),
        (pickle.dumps({b"data": _Runs(), b"labels": []}), "which no array needs"),
        (pickle.dumps({b"data": torch.zeros(1), b"labels": []}), "which no array needs"),
    ],
)
def test_other_pickles_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "batch"
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match=message):
        data.read_cifar_batch(path)
    assert not Path("a-pickle-ran-code").exists()


def test_cifar10_says_which_shape_is_wrong(cifar_folder: Path) -> None:
    np = pytest.importorskip("numpy")
    path = cifar_folder / "cifar-10-batches-py" / "test_batch"
    batch = {b"labels": [0], b"data": np.zeros((1, 5), dtype=np.uint8)}
    path.write_bytes(pickle.dumps(batch))
    with pytest.raises(ArgumentError, match=r"holds \(1, 5\) of torch.uint8 for 1 labels"):
        data.read_cifar_batch(path)


def test_text_is_cut_into_windows(tmp_path: Path) -> None:
    path = tmp_path / "text"
    content = bytes(range(97, 107)) * 70
    path.write_bytes(content)
    loaded = data.load("text", path, CPU)
    assert (loaded.train_images.shape, loaded.test_images.shape) == ((9, 64), (1, 64))
    assert loaded.classes == 10
    windows = torch.cat([loaded.train_images, loaded.test_images])
    assert bytes((windows.flatten() + 97).tolist()) == content[:640]
    following = torch.cat([loaded.train_labels, loaded.test_labels]).flatten()
    assert bytes((following + 97).tolist()) == content[1:641]
    path.write_bytes(content[:600])
    with pytest.raises(ArgumentError, match="is too short: 600 of 641 bytes"):
        data.load("text", path, CPU)
    with pytest.raises(ArgumentError, match="needs --data-path FILE"):
        data.load("text", None, CPU)


def test_a_smaller_problem_holds_images_out() -> None:
    digits = data.load("digits", None, CPU)
    small = data.reduced(digits, images=100, pool=2, validation=30)
    assert small.train_images.shape == (70, 1, 4, 4)
    assert small.test_images.shape == (100, 1, 4, 4)
    assert small.validation_images is not None
    assert small.validation_labels is not None
    both = torch.cat([small.train_images, small.validation_images])
    torch.testing.assert_close(both, nn.functional.avg_pool2d(digits.train_images[:100], 2))
    labels = torch.cat([small.train_labels, small.validation_labels])
    assert torch.equal(labels, digits.train_labels[:100])


def test_unknown_data_set_is_refused() -> None:
    with pytest.raises(ArgumentError, match="unknown data set 'mnist'"):
        data.load("mnist", None, CPU)


def test_augment_moves_and_mirrors_whole_images() -> None:
    images = torch.arange(1.0, 1 + 64 * 2 * 8 * 8).reshape(64, 2, 8, 8)
    moved = data.augment(images, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images, [4] * 4)
    seen = set()
    for image, source in zip(moved, padded, strict=True):
        places = [
            (top, left, mirrored)
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
            if torch.equal(
                image.flip(2) if mirrored else image,
                source[:, top : top + 8, left : left + 8],
            )
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 32, "images should be moved independently"
    assert {mirrored for *_, mirrored in seen} == {False, True}
