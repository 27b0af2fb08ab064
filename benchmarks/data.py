"""Data sets as whole tensors on the device that trains: images, and a text.

Images are normalized with the mean and standard deviation (per colour) of the training images.
CIFAR10 is augmented in training with random crops (4 pixels of padding) and flips; Fashion-MNIST
and the digits are not augmented. A text is cut into windows, and what follows each of its bytes is
to be told.
"""

from __future__ import annotations

import gzip
import math
import pickle
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from enorm_fx.errors import ArgumentError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CROP_PADDING = 4
CIFAR_FOLDER = "cifar-10-batches-py"
WINDOW = 64  # bytes of a text that are read together


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Images (N, C, H, W) in float32, labels (N,) in int64, for training and for testing.

    Of a text, both are windows (N, WINDOW) in int64: what is read, and what follows each of it.
    The images of validation, if there are any, are held out of the training images.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    augmented: bool
    validation_images: Tensor | None = None
    validation_labels: Tensor | None = None

    def to(self, device: torch.device) -> Dataset:
        """The same data set on a device."""
        tensors: dict[str, Any] = {
            name: value.to(device)
            for name in self.__slots__
            if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **tensors)


def load(name: str, data_path: Path | None, device: torch.device) -> Dataset:
    """Load a data set by name onto a device; `data_path` is where its files lie."""
    if name == "digits":
        return _digits().to(device)
    if name == "fashion-mnist":
        return _fashion_mnist(data_path).to(device)
    if name == "cifar10":
        return _cifar10(data_path).to(device)
    if name == "text":
        return _text(data_path).to(device)
    raise ArgumentError(f"unknown data set {name!r}: use digits, fashion-mnist, cifar10 or text")


def reduced(data: Dataset, *, images: int | None, pool: int, validation: int) -> Dataset:
    """A smaller problem: the first `images` to train and to test on, means over pool x pool pixels.

    The last `validation` of these training images are held out of the training.
    """
    count = len(data.train_labels) if images is None else images
    if validation >= min(count, len(data.train_labels)):
        raise ArgumentError(
            f"--validation {validation} leaves none of {min(count, len(data.train_labels))} images "
            "to train on: hold out fewer"
        )
    train_images, test_images = data.train_images[:count], data.test_images[:count]
    if pool > 1:
        if train_images.ndim != 4 or pool > min(train_images.shape[2:]):
            raise ArgumentError(f"--pool {pool} does not fit {data.name}: it needs larger images")
        train_images, test_images = (
            F.avg_pool2d(train_images, pool),
            F.avg_pool2d(test_images, pool),
        )
    train_labels, kept = data.train_labels[:count], len(train_images) - validation
    return replace(
        data,
        train_images=train_images[:kept],
        train_labels=train_labels[:kept],
        test_images=test_images,
        test_labels=data.test_labels[:count],
        validation_images=train_images[kept:] if validation else None,
        validation_labels=train_labels[kept:] if validation else None,
    )


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
    """The python batches of CIFAR10: in the folder, in its cifar-10-batches-py, or downloaded."""
    root = data_path or _download_root()
    folder = root if (root / "test_batch").is_file() else root / CIFAR_FOLDER
    if not folder.is_dir():
        from torchvision.datasets import CIFAR10

        CIFAR10(str(root), download=True)
    parts = [read_cifar_batch(folder / f"data_batch_{number}") for number in range(1, 6)]
    train_images, train_labels = map(torch.cat, zip(*parts, strict=True))
    test_images, test_labels = read_cifar_batch(folder / "test_batch")
    return _dataset("cifar10", train_images, train_labels, test_images, test_labels, augmented=True)


def read_cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) and labels (N,) of one pickled batch; no code in it is run.

    The format: a dict of b"data", (N, 3072) bytes, red, green, blue, and b"labels", N integers.
    """
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError) as error:
        raise ArgumentError(f"{path} is no batch of CIFAR10: {error}") from error
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise ArgumentError(f"{path} is no batch of CIFAR10: it has no data and labels")
    images, labels = torch.from_numpy(batch[b"data"]), torch.tensor(batch[b"labels"])
    if images.dtype != torch.uint8 or images.shape != (len(labels), 3072):
        raise ArgumentError(
            f"{path} holds {tuple(images.shape)} of {images.dtype} for {len(labels)} labels, not "
            f"({len(labels)}, 3072) bytes"
        )
    return images.reshape(-1, 3, 32, 32), labels


class _ArraysOnly(pickle.Unpickler):
    """Reads what makes up an array of numpy, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        package = module.split(".")[0]
        if package == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in old protocols
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")


def _text(data_path: Path | None) -> Dataset:
    """Windows of a file of text: the last tenth is to test on."""
    if data_path is None:
        raise ArgumentError("the data set 'text' needs --data-path FILE, a file of text")
    content = torch.frombuffer(bytearray(data_path.read_bytes()), dtype=torch.uint8)
    known, codes = content.unique(return_inverse=True)
    count = (len(codes) - 1) // WINDOW
    tests = count // 10
    if not tests:
        raise ArgumentError(f"{data_path} is too short: {len(codes)} of {10 * WINDOW + 1} bytes")
    read = codes[: count * WINDOW].reshape(count, WINDOW)
    following = codes[1 : count * WINDOW + 1].reshape(count, WINDOW)
    return Dataset(
        name="text",
        train_images=read[:-tests],
        train_labels=following[:-tests],
        test_images=read[-tests:],
        test_labels=following[-tests:],
        classes=len(known),
        augmented=False,
    )


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
