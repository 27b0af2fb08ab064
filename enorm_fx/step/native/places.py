"""Where tensors lie, and what dictionaries hold, each told by one call.

Dictionaries are asked through Python's C interface, tensors through DLPack's for exchange (DLPack
1.3, `__dlpack_c_exchange_api__`), in which torch gives the address, device, dtype, sizes and
strides of a tensor. A hundred are asked in the time that twenty take by methods of torch.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Sequence
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


class Items:
    """Which objects dictionaries hold: what holders[k] has under keys[k], if anything, and how many
    keys each of `sized` has.

    Raises Unsupported where there is no compiler.
    """

    def __init__(
        self,
        holders: Sequence[dict[Any, Any]],
        keys: Sequence[object],
        sized: Sequence[dict[Any, Any]],
    ) -> None:
        self._library = _library()
        # Addresses stay those of these objects for as long as they are held here.
        values = [holder.get(key) for holder, key in zip(holders, keys, strict=True)]
        self._kept = list(holders), list(keys), values, list(sized)
        found = [
            id(value) if key in holder else None
            for holder, key, value in zip(holders, keys, values, strict=True)
        ]
        lengths = (ctypes.c_int64 * len(sized))(*map(len, sized))
        self._arguments = (
            _python("PyDict_GetItemWithError"),
            _python("PyDict_Size"),
            *(_addresses(column) for column in (map(id, holders), map(id, keys), found)),
            len(found),
            _addresses(map(id, sized)),
            lengths,
            len(sized),
        )

    def hold(self) -> bool:
        """Whether all of it is so still."""
        return bool(self._library.enorm_same_items(*self._arguments))


def _addresses(found: Iterable[int | None]) -> Any:
    found = list(found)
    return (ctypes.c_void_p * len(found))(*found)


def items_of(
    holders: Sequence[dict[Any, Any]], keys: Sequence[object], sized: Sequence[dict[Any, Any]]
) -> Items | None:
    """None where they cannot be had."""
    try:
        return Items(holders, keys, sized)
    except Unsupported:
        return None


def places_of(tensors: Sequence[Tensor]) -> Places | None:
    """None where they cannot be had."""
    try:
        return Places(tensors)
    except Unsupported:
        return None


@functools.cache
def _interface() -> tuple[ctypes.PyDLL, int, int]:
    """The library, and functions of torch and of Python that it calls."""
    library = _library()
    found = vars(Tensor).get("__dlpack_c_exchange_api__")
    if found is None:
        raise Unsupported(f"torch {torch.__version__} has no __dlpack_c_exchange_api__")
    kind = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    pointer = kind(("PyCapsule_GetPointer", ctypes.pythonapi))
    exchange = _Exchange.from_address(pointer(found, _NAME))
    if exchange.major != _MAJOR or not exchange.tensor_from_object:
        raise Unsupported(f"DLPack's interface has the version {exchange.major}.{exchange.minor}")
    return library, exchange.tensor_from_object, _python("PyList_GetItem")


@functools.cache
def _library() -> ctypes.PyDLL:
    """The compiled code, of which calls keep the GIL."""
    try:
        library = ctypes.PyDLL(load()._name)
    except CompilerError as error:
        raise Unsupported(str(error)) from error
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    first = pointer, pointer, ctypes.py_object, number, pointer
    library.enorm_places.argtypes = (*first, number)
    library.enorm_places.restype = number
    library.enorm_same_places.argtypes = (*first, number, pointer)
    library.enorm_same_places.restype = ctypes.c_int
    library.enorm_same_items.argtypes = (*[pointer] * 5, number, pointer, pointer, number)
    library.enorm_same_items.restype = ctypes.c_int
    return library


def _python(name: str) -> int:
    """The address of a function of Python's C interface."""
    return ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0
