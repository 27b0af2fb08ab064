"""Where tensors lie, told by one call: torch answers through DLPack's C interface for exchange.

That interface takes Python's tensors as they are and gives their address, device, dtype, sizes and
strides (DLPack 1.3, `__dlpack_c_exchange_api__`). A hundred tensors are asked in the time that
twenty take by the methods of torch, one after the other.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from enorm_fx.step.native.compiler import CompilerError, load
from enorm_fx.step.native.pack import Unsupported

_NAME = b"dlpack_exchange_api"
_MAJOR = 1  # what is read of the interface stays as it is while this is its version


class _Exchange(ctypes.Structure):
    """DLPackExchangeAPI of dlpack.h."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("before", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("managed_from_object", ctypes.c_void_p),
        ("managed_to_object", ctypes.c_void_p),
        ("tensor_from_object", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    ]


class Places:
    """What DLPack tells of some tensors, none of which is a subclass that holds no memory itself.

    Raises Unsupported where torch has no such interface, or there is no compiler.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._library, self._from_object, self._item = _interface()
        room = sum(4 + 2 * tensor.dim() for tensor in tensors)
        known = (ctypes.c_int64 * max(1, room))()
        arguments = self._from_object, self._item, self._tensors, len(self._tensors)
        try:
            numbers = self._library.enorm_places(*arguments, known, room)
        except (RuntimeError, BufferError) as error:
            raise Unsupported(f"DLPack does not know such a tensor: {error}") from error
        if numbers != room:
            raise Unsupported("DLPack tells other sizes than torch")
        self._arguments = (*arguments, known, room, None)
        self._found = (ctypes.c_int64 * len(self._tensors))()

    def hold(self) -> bool:
        """Whether all of this is what it was, the addresses too."""
        return self._same(self._arguments)

    def of_alike(self, others: list[Any]) -> list[int] | None:
        """The addresses of as many other tensors; None where they differ in more than these."""
        known, room = self._arguments[4:6]
        arguments = self._from_object, self._item, others, len(others), known, room, self._found
        same = len(others) == len(self._tensors) and self._same(arguments)
        return list(self._found) if same else None

    def _same(self, arguments: tuple[Any, ...]) -> bool:
        try:
            return bool(self._library.enorm_same_places(*arguments) == 1)
        except (RuntimeError, BufferError):  # a tensor without memory, or on a device of no name
            return False


def places_of(tensors: Sequence[Tensor]) -> Places | None:
    """None where they cannot be had."""
    try:
        return Places(tensors)
    except Unsupported:
        return None


@functools.cache
def _interface() -> tuple[ctypes.PyDLL, int, int]:
    """The library, which keeps the GIL when called so, and functions of torch and of Python."""
    try:
        library = ctypes.PyDLL(load()._name)
    except CompilerError as error:
        raise Unsupported(str(error)) from error
    found = vars(Tensor).get("__dlpack_c_exchange_api__")
    if found is None:
        raise Unsupported(f"torch {torch.__version__} has no __dlpack_c_exchange_api__")
    kind = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    pointer = kind(("PyCapsule_GetPointer", ctypes.pythonapi))
    exchange = _Exchange.from_address(pointer(found, _NAME))
    if exchange.major != _MAJOR or not exchange.tensor_from_object:
        raise Unsupported(f"DLPack's interface has the version {exchange.major}.{exchange.minor}")
    item = ctypes.cast(ctypes.pythonapi.PyList_GetItem, ctypes.c_void_p).value or 0
    first = ctypes.c_void_p, ctypes.c_void_p, ctypes.py_object, ctypes.c_int64, ctypes.c_void_p
    library.enorm_places.argtypes = (*first, ctypes.c_int64)
    library.enorm_places.restype = ctypes.c_int64
    library.enorm_same_places.argtypes = (*first, ctypes.c_int64, ctypes.c_void_p)
    library.enorm_same_places.restype = ctypes.c_int
    return library, exchange.tensor_from_object, item
