"""Image data sets as whole tensors on the device that trains.

Every data set is normalized with the mean and standard deviation (per colour) of its training
images. CIFAR10 is augmented in training with random crops (4 pixels of padding) and flips;
Fashion-MNIST and the digits are not augmented.
"""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from enorm_fx.errors import ArgumentError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CROP_PADDING = 4


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Images (N, C, H, W) in float32, labels (N,) in int64, for training and for testing."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    augmented: bool

    def to(self, device: torch.device) -> Dataset:
        """The same data set on a device."""
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )


def load(name: str, data_path: Path | None, device: torch.device) -> Dataset:
    """Load a data set by name onto a device; `data_path` is where its files lie."""
    if name == "digits":
        return _digits().to(device)
    if name == "fashion-mnist":
        return _fashion_mnist(data_path).to(device)
    if name == "cifar10":
        return _cifar10(data_path).to(device)
    raise ArgumentError(f"unknown data set {name!r}: use digits, fashion-mnist or cifar10")


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop and mirror every image at random: (N, C, H, W) -> (N, C, H, W).

    The random numbers are drawn on the CPU, so that every device sees the same images.
    """
    count, channels, height, width = images.shape
    shifts = torch.randint(2 * CROP_PADDING + 1, (2, count, 1), generator=generator)
    mirrored = torch.randint(2, (count, 1), generator=generator).bool()
    rows = shifts[0] + torch.arange(height)
    columns = shifts[1] + torch.arange(width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    device = images.device
    return F.pad(images, [CROP_PADDING] * 4)[
        torch.arange(count, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[None, :, None, None],
        rows.to(device)[:, None, :, None],
        columns.to(device)[:, None, None, :],
    ]


def read_idx(path: Path) -> Tensor:
    """Read a file of unsigned bytes in the idx format, plain or gzipped, as a uint8 tensor.

    The format: two zero bytes, the type (8: unsigned byte), the number of axes, each axis's
    size as a big-endian 32-bit number, the bytes.
    """
    content = _read_bytes(path)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ArgumentError(
            f"{path} is no idx file of unsigned bytes: it starts with {content[:4].hex(' ')}, "
            "not with 00 00 08"
        )
    axes = content[3]
    start = 4 + 4 * axes
    if len(content) < start:
        raise ArgumentError(f"{path} ends within its idx header")
    shape = struct.unpack(f">{axes}I", content[4:start])
    if 0 in shape or len(content) - start != math.prod(shape):
        raise ArgumentError(
            f"{path} announces shape {shape}, {math.prod(shape)} bytes, "
            f"but holds {len(content) - start}"
        )
    # A bytearray, because torch warns about memory that it may not write to.
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError) as error:
        raise ArgumentError(f"{path} is a damaged gzip file: {error}") from error


def _fashion_mnist(data_path: Path | None) -> Dataset:
    folder = _fashion_mnist_folder(data_path)
    parts = [
        read_idx(_find_idx(folder, f"{part}-{kind}"))
        for part in ("train", "t10k")
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    train_images, train_labels, test_images, test_labels = parts
    return _dataset(
        "fashion-mnist",
        train_images.unsqueeze(1),
        train_labels,
        test_images.unsqueeze(1),
        test_labels,
    )


def _fashion_mnist_folder(data_path: Path | None) -> Path:
    """The folder of the idx files: given, Debian's, or downloaded by torchvision."""
    if data_path is None and DEBIAN_FASHION_MNIST.is_dir():
        return DEBIAN_FASHION_MNIST
    root = data_path or _download_root()
    if data_path is not None and any(root.glob("train-images-idx3-ubyte*")):
        return root
    from torchvision.datasets import FashionMNIST

    FashionMNIST(str(root), download=True)
    return root / "FashionMNIST" / "raw"


def _find_idx(folder: Path, stem: str) -> Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise ArgumentError(f"{folder} holds neither {stem} nor {stem}.gz")


def _cifar10(data_path: Path | None) -> Dataset:
    from torchvision.datasets import CIFAR10

    root = str(data_path or _download_root())
    train, test = CIFAR10(root, train=True, download=True), CIFAR10(root, train=False)
    parts = [_from_arrays(part.data, part.targets) for part in (train, test)]
    (train_images, train_labels), (test_images, test_labels) = parts
    return _dataset("cifar10", train_images, train_labels, test_images, test_labels, augmented=True)


def _from_arrays(images: Any, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(N, H, W, C) bytes of torchvision -> (N, C, H, W), and the labels."""
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(labels)


def _digits() -> Dataset:
    """scikit-learn's 1,797 digits of 8x8 pixels: four fifths to train, one fifth to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train_images, test_images, train_labels, test_labels = (
        torch.from_numpy(part)
        for part in train_test_split(
            digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
        )
    )
    return _dataset(
        "digits", train_images.unsqueeze(1), train_labels, test_images.unsqueeze(1), test_labels
    )


def _dataset(
    name: str,
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    augmented: bool = False,
) -> Dataset:
    """Normalize the images and settle the types."""
    # Bytes or float64 come in, so float() makes the copies that are then changed in place.
    train, test = train_images.float().contiguous(), test_images.float().contiguous()
    mean = train.mean((0, 2, 3), keepdim=True)
    std = train.std((0, 2, 3), keepdim=True)
    labels = train_labels.long()
    return Dataset(
        name=name,
        train_images=train.sub_(mean).div_(std),
        train_labels=labels,
        test_images=test.sub_(mean).div_(std),
        test_labels=test_labels.long(),
        classes=int(labels.max()) + 1,
        augmented=augmented,
    )


def _download_root() -> Path:
    return Path(torch.hub.get_dir()).parent / "datasets"
