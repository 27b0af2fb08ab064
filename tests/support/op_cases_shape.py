"""Ops that move entries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.op_cases import OpCase, spell, x

aten = torch.ops.aten


def reshapes() -> Iterator[OpCase]:
    changes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
        ((2, 3), (6,)), ((2, 3), (3, 2)), ((6,), (2, -1)), ((2, 3, 2), (2, 6)),
        ((2, 3, 2), (-1, 2)),
        ((1, 4, 2), (1, 2, 2, 2)), ((2, 1, 3), (2, 3, 1)), ((4, 3), (2, 2, 3)), ((1,), ()),
        ((2, 3), (1, 2, 1, 3)), ((2, 2, 3), (3, 4)),
    )  # fmt: skip
    for old, new in changes:
        yield OpCase(f"reshape {old} {new}", lambda a, s=new: a.reshape(s), (x(*old),))
        yield OpCase(f"view {old} {new}", lambda a, s=new: a.view(s), (x(*old),))
        yield OpCase(f"torch.reshape {old} {new}", lambda a, s=new: torch.reshape(a, s), (x(*old),))
    cube = x(2, 3, 2)
    for args in ((), (1,), (0, 1), (-2, -1), (1, 1)):
        yield from spell("flatten", *args, inputs=(cube,))
    yield OpCase("nn.Flatten", nn.Flatten(), (x(2, 3, 2),))
    yield OpCase("nn.Flatten(0, -2)", nn.Flatten(0, -2), (x(2, 3, 2),))
    yield OpCase("nn.Unflatten", nn.Unflatten(1, (2, 2)), (x(2, 4),))
    yield from spell("unflatten", 1, (2, -1), inputs=(x(2, 4),))
    for args in ((), (0,), (1,), (-1,)):
        yield from spell("squeeze", *args, inputs=(x(2, 1, 3),))
    yield OpCase("squeeze((0, 1))", lambda a: a.squeeze((0, 1)), (x(1, 1, 3),))
    for dim in (0, 1, -1, 2):
        yield from spell("unsqueeze", dim, inputs=(x(2, 3),))
    yield OpCase("view_as", lambda a, b: a.view_as(b), (x(2, 3), x(3, 2)))
    yield OpCase("reshape_as", lambda a, b: a.reshape_as(b), (x(2, 3), x(6)))
    yield from spell("ravel", inputs=(cube,))
    yield OpCase("aten._unsafe_view", lambda a: aten._unsafe_view.default(a, [6]), (x(2, 3),))
    yield OpCase("aten.view", lambda a: aten.view.default(a, [3, 2]), (x(2, 3),))
    for name in ("atleast_1d", "atleast_2d", "atleast_3d"):
        for shape in ((), (3,), (2, 3)):
            yield OpCase(f"{name} {shape}", getattr(torch, name), (x(*shape),))
    yield OpCase("atleast_2d of two", torch.atleast_2d, (x(3), x(2)), "rarely met")
    yield OpCase("view(dtype)", lambda a: a.view(torch.int64), (x(2, 3),), "bits")


def permutations() -> Iterator[OpCase]:
    cube = x(2, 3, 4)
    for order in ((0, 2, 1), (2, 0, 1), (-1, 0, 1)):
        yield OpCase(f"permute{order}", lambda a, o=order: a.permute(*o), (cube,))
        yield OpCase(f"permute({order})", lambda a, o=order: torch.permute(a, o), (cube,))
        yield OpCase(f"permute(dims={order})", lambda a, o=order: a.permute(dims=o), (cube,))
    for first, second in ((0, 1), (1, 2), (-1, 0), (-2, -1)):
        for name in ("transpose", "swapaxes", "swapdims"):
            yield from spell(name, first, second, inputs=(cube,))
        yield OpCase(f"transpose(dim0={first}, dim1={second})", lambda a, i=first, j=second:
                     torch.transpose(a, dim0=i, dim1=j), (cube,))  # fmt: skip
    for source, destination in ((0, 2), (-1, 0), ((0, 1), (1, 2)), ((2, 0), (0, 1))):
        yield from spell("movedim", source, destination, inputs=(cube,))
        yield from spell("moveaxis", source, destination, inputs=(cube,))
    yield OpCase("movedim by names", lambda a: torch.movedim(a, source=0, destination=1), (cube,))
    yield OpCase("permute of a square", lambda a: a.permute(1, 0), (x(3, 3),))
    yield from spell("t", inputs=(x(2, 3),))
    yield OpCase("t of a vector", lambda a: a.t(), (x(3),))
    yield OpCase("x.T", lambda a: a.T, (x(2, 3),))
    yield OpCase("x.H", lambda a: a.H, (x(2, 3),))
    yield OpCase("x.mT", lambda a: a.mT, (cube,))
    yield OpCase("x.mH", lambda a: a.mH, (cube,))
    yield from spell("adjoint", inputs=(cube,))
    yield OpCase("aten.numpy_T", aten.numpy_T.default, (x(2, 3),))
    yield OpCase("aten.movedim.int", lambda a: aten.movedim.int(a, 0, 2), (cube,))
    for shape in ((2, 3), (4, 2, 3), (2, -1)):
        yield OpCase(f"expand{shape}", lambda a, s=shape: a.expand(*s), (x(1, 3),))
    yield OpCase("expand_as", lambda a, b: a.expand_as(b), (x(1, 3), x(2, 3)))
    yield from spell("broadcast_to", (2, 2, 3), inputs=(x(2, 1),))


_INDICES: dict[str, Any] = {
    "0": 0, "-1": -1, "1:": slice(1, None), "::2": slice(None, None, 2), ":-1": slice(None, -1),
    "None": None, "...": ..., "..., 0": (..., 0), "0, ...": (0, ...), ":, 1": (slice(None), 1),
    ":, 1:3": (slice(None), slice(1, 3)), "None, ..., 1": (None, ..., 1),
    ":, ::2, None": (slice(None), slice(None, None, 2), None), "0, 1": (0, 1),
    "..., None": (..., None), "1:, ..., -1": (slice(1, None), ..., -1),
    "[2, 0]": [2, 0], ":, [2, 0, 1]": (slice(None), [2, 0, 1]),
    "tensor": torch.tensor([2, 0, 0]), ":, tensor": (slice(None), torch.tensor([3, 1, 0, 2])),
    "pairs": (torch.tensor([0, 2]), torch.tensor([1, 1])),
    "0, tensor": (0, torch.tensor([1, 3])), "()": (), "tensor 0-d": torch.tensor(1),
    "2-d tensor": torch.tensor([[0, 1], [2, 0]]), "True": True,
}  # fmt: skip


def indices() -> Iterator[OpCase]:
    for name, index in _INDICES.items():
        yield OpCase(f"x[{name}]", lambda a, i=index: a[i], (x(3, 4, 2),))
    picked = torch.tensor([2, 0, 3])
    yield OpCase("aten.index", lambda a: aten.index.Tensor(a, [None, picked]), (x(2, 4, 2),))
    unknown = "the index depends on the input"
    yield OpCase("x[y > 0] by where", lambda a, i: a[i], (x(3, 2), torch.tensor([0, 1])), unknown)
    yield OpCase("x[i] for an input i", lambda a, i: a[:, i], (x(3, 4), torch.tensor([1])), unknown)
    shuffled = torch.arange(4).view(2, 2).T.reshape(-1)
    yield OpCase("channel shuffle by index", lambda a: a[:, shuffled], (x(1, 4, 2),))
    for args in ((0, 1), (1, -1), (-1, 0)):
        yield from spell("select", *args, inputs=(x(3, 2, 2),))
    yield OpCase("aten.select_copy", lambda a: aten.select_copy.int(a, 1, 0), (x(2, 3),))
    for args in ((0, 1, 2), (1, 0, 1), (-1, -2, 2)):
        yield from spell("narrow", *args, inputs=(x(3, 3),))
    yield OpCase(
        "narrow by a tensor", lambda a: a.narrow(1, torch.tensor(1), 2), (x(2, 3),), unknown
    )
    yield OpCase("aten.slice", lambda a: aten.slice.Tensor(a, 1, 0, 4, 2), (x(2, 5),))
    yield OpCase("aten.slice(-1)", lambda a: aten.slice.Tensor(a, -1, -2), (x(2, 5),))
    for dim in (0, 1, -1):
        yield from spell("unbind", dim, inputs=(x(2, 3),))
        yield from spell("index_select", dim, torch.tensor([1, 0, 1]), inputs=(x(2, 3),))
    for dim, rows in ((0, [[1, 0, 1]]), (1, [[1, 0], [2, 2]]), (-1, [[0, 1], [1, 0]])):
        yield from spell("gather", dim, torch.tensor(rows), inputs=(x(2, 3),))
    yield OpCase("gather by an input", lambda a, i: a.gather(1, i),
                 (x(2, 3), torch.tensor([[1], [0]])), "any entry of a row may be read")  # fmt: skip
    yield OpCase("index_select by an input", lambda a, i: a.index_select(0, i),
                 (x(2, 3), torch.tensor([1])), unknown)  # fmt: skip


def pieces() -> Iterator[OpCase]:
    for dim in (0, 1, -1):
        yield from spell("chunk", 2, dim, inputs=(x(4, 3),))
        yield from spell("chunk", 3, dim, inputs=(x(3, 4),))
        yield from spell("split", 2, dim, inputs=(x(3, 3),))
        yield from spell("split", [1, 2], dim, inputs=(x(3, 3),))
        yield from spell("tensor_split", 2, dim, inputs=(x(3, 3),))
        yield from spell("tensor_split", (1, 2), dim, inputs=(x(3, 3),))
        yield from spell("split_with_sizes", [2, 1], dim, inputs=(x(3, 3),))
        yield from spell("unsafe_split", 2, dim, inputs=(x(3, 3),))
        yield from spell("unsafe_chunk", 2, dim, inputs=(x(3, 3),))
    yield from spell("hsplit", 2, inputs=(x(3, 4),))
    yield from spell("hsplit", 2, inputs=(x(4),))
    yield from spell("vsplit", [1], inputs=(x(3, 2),))
    yield OpCase("chunk by names", lambda a: torch.chunk(a, chunks=2, dim=1), (x(2, 4),))
    yield OpCase(
        "split by names", lambda a: torch.split(a, split_size_or_sections=2, dim=1), (x(2, 4),)
    )
    yield OpCase("split(split_size)", lambda a: a.split(split_size=2, dim=-1), (x(2, 4),))
    yield OpCase("chunk, one part used", lambda a: torch.chunk(a, 2, 1)[1].relu(), (x(2, 4),))
    yield OpCase("swapped halves", lambda a: torch.cat(a.chunk(2, 1)[::-1], 1), (x(2, 4),))


def rearrangements() -> Iterator[OpCase]:
    a, image = x(2, 3), x(1, 4, 2, 2)
    yield from spell("flip", (0, 1), inputs=(a,))
    yield from spell("flip", [-1], inputs=(a,))
    yield from spell("fliplr", inputs=(a,))
    yield from spell("flipud", inputs=(a,))
    for args in ((1,), (1, 1), ((1, -1), (0, 1)), (-1, -1)):
        yield from spell("roll", *args, inputs=(a,))
    yield OpCase("repeat", lambda a: a.repeat(2, 1), (a,))
    yield OpCase("repeat more axes", lambda a: a.repeat(2, 1, 2), (a,))
    yield from spell("tile", (2, 1), inputs=(a,))
    for args in ((2,), (2, 1), (3, 0)):
        yield from spell("repeat_interleave", *args, inputs=(a,))
    yield from spell("pixel_shuffle", 2, inputs=(image,))
    yield from spell("pixel_unshuffle", 2, inputs=(image,))
    yield from spell("channel_shuffle", 2, inputs=(image,))
    yield OpCase("aten.channel_shuffle", lambda a: torch.native_channel_shuffle(a, 2), (image,))
    yield OpCase("nn.PixelShuffle", nn.PixelShuffle(2), (image,))
    yield OpCase("nn.PixelUnshuffle", nn.PixelUnshuffle(2), (image,))
    yield OpCase("nn.ChannelShuffle", nn.ChannelShuffle(2), (image,))
    yield from spell("rot90", 1, (0, 1), inputs=(a,))
    yield from spell("diagonal", inputs=(x(3, 3),))
    yield from spell("diagonal", 1, -2, -1, inputs=(x(2, 3, 3),))
    position = "positions share a scale"
    yield OpCase("F.unfold", lambda a: F.unfold(a, 2), (x(1, 2, 3, 3),), position, 2)
    yield OpCase("nn.Unfold", nn.Unfold(2, stride=2, padding=1), (x(2, 2, 2, 2),), position, 4)
    yield OpCase("x.unfold", lambda a: a.unfold(1, 2, 1), (x(2, 3),), "no rule")
    yield from strides()
    yield OpCase("F.fold", lambda a: F.fold(a, (3, 3), 2), (x(1, 4, 4),), "no rule")
    for name in ("tril", "triu"):
        for args in ((), (1,), (-1,)):
            yield from spell(name, *args, inputs=(x(3, 3),))
    yield OpCase("channel shuffle by views", _shuffle, (image,))


def strides() -> Iterator[OpCase]:
    a, pair = x(2, 3), x(4, 2)
    yield from spell("as_strided", (3, 2), (2, 1), inputs=(a,), in_place="a view is made anew")
    yield from spell("as_strided", (3, 2), (1, 3), inputs=(a,), in_place="a view is made anew")
    yield OpCase("overlapping windows", lambda a: a.as_strided((3, 2, 2), (2, 2, 1)), (pair,))
    yield OpCase("as_strided of a part", lambda a: a[1:].as_strided((2, 2), (2, 1)), (pair,))
    yield OpCase("as_strided of a transpose", lambda a: a.t().as_strided((4,), (2,)), (pair,))
    yield OpCase("aten.as_strided", lambda a: aten.as_strided.default(a, [2], [3], 1), (a,))
    yield OpCase("as_strided back", lambda a: a[1:].as_strided((2,), (1,), 0), (pair,), "beside", 0)
    yield OpCase(
        "as_strided of an expanded tensor", lambda a: a.expand(2, 2).as_strided((2,), (1,)),
        (x(2),), "entries share a place", 0,
    )  # fmt: skip


def _shuffle(a: Tensor) -> Tensor:
    return a.view(1, 2, 2, 2, 2).transpose(1, 2).reshape(1, 4, 2, 2)


CASES = [
    *reshapes(), *permutations(), *indices(), *pieces(), *rearrangements()
]  # fmt: skip
