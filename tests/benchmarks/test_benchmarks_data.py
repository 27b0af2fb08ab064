"""The training benchmark's data sets: readers that check what they read, and augmentation."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

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


def test_cifar10_arrives_as_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np, datasets = pytest.importorskip("numpy"), pytest.importorskip("torchvision.datasets")

    class Cifar:
        def __init__(self, root: str, train: bool, download: bool = False) -> None:
            assert root == str(tmp_path)
            count = 20 if train else 10
            self.data = np.arange(count * 32 * 32 * 3, dtype=np.int64) % 251
            self.data = self.data.astype(np.uint8).reshape(count, 32, 32, 3)
            self.targets = [number % 10 for number in range(count)]

    monkeypatch.setattr(datasets, "CIFAR10", Cifar)
    loaded = data.load("cifar10", tmp_path, CPU)
    assert loaded.train_images.shape == (20, 3, 32, 32)
    assert loaded.test_images.shape == (10, 3, 32, 32)
    assert loaded.augmented
    first = torch.arange(3 * 32 * 32).reshape(32, 32, 3)[..., 1] % 251
    channel = loaded.train_images[0, 1]
    scale = (channel[0, 1] - channel[0, 0]) / 3
    torch.testing.assert_close((channel - channel[0, 0]) / scale + 1, first.float())
    torch.testing.assert_close(loaded.train_images.mean((0, 2, 3)), torch.zeros(3))


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
