"""What every file of weights can do, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from torch import Tensor

Edit = Callable[[Tensor], None]
"""Changes a tensor in place."""

CHUNK = 1 << 22  # bytes that are copied at once


class WeightFile(Protocol):
    """A file with named tensors.

    path:    where it is.
    tensors: by name, on the CPU; tied ones share their storage. Not to be written to.
    others:  names of what else is in the file and is copied as it is ("optimizer", "epoch").
    """

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def others(self) -> tuple[str, ...]: ...

    def release(self) -> None:
        """Give memory back that can be read again."""

    def write(self, target: BinaryIO, edits: Mapping[str, Edit]) -> None:
        """Write the file anew with some tensors edited, one in memory at a time.

        edits: by name. Of names that share a tensor one is enough.
        """
