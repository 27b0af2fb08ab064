"""Ops that move entries: the very same op moves the ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from enorm_fx.nested import instances
from enorm_fx.rules.registry import MAX_IDS, Context, Flow, rule
from enorm_fx.symmetry.labels import Label, expand_dims, squeeze_constant
from enorm_fx.tracing.trace import Node, Spec


def _flat(sizes: tuple[Any, ...]) -> list[Any]:
    """permute(0, 2, 1) and permute((0, 2, 1)) alike."""
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        return list(sizes[0])
    return list(sizes)


def reshape_ids(ids: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Reshape ids as a tensor of shape `old` becomes one of shape `new`.

    Axes are matched in the smallest blocks of equal size; only blocks in which the ids vary are
    written out, so batch and position axes stay at size 1.
    """
    grown: list[int] = []
    result: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        size_old = size_new = 1
        if i < len(old):
            size_old, i = old[i], i + 1
        if j < len(new):
            size_new, j = new[j], j + 1
        while size_old != size_new:
            if size_old < size_new:
                size_old, i = size_old * old[i], i + 1
            else:
                size_new, j = size_new * new[j], j + 1
        if any(ids.shape[a] > 1 for a in range(start_i, i)):
            grown += old[start_i:i]
            result += new[start_j:j]
        else:
            grown += [1] * (i - start_i)
            result += [1] * (j - start_j)
    return squeeze_constant(ids.expand(grown).reshape(result))


@rule("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
      "ravel", "unsafe_view", "atleast_1d", "atleast_2d", "atleast_3d",
      flow=Flow.MOVES)  # fmt: skip
def reshape(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Any:
    """The same entries in the same order under another shape."""
    if isinstance(ctx.out, tuple) or any(isinstance(a, torch.dtype) for a in args):
        return NotImplemented  # view(dtype) reads the bits in another way
    if 0 in input.shape:
        return Label(ctx.shape)
    if any(_written_out(t.ids, input.shape) > MAX_IDS for t in input.terms):
        return NotImplemented
    return input.map(ctx.shape, lambda ids: reshape_ids(ids, input.shape, ctx.shape))


def _written_out(ids: Tensor, shape: Sequence[int]) -> int:
    return 0 if ids.numel() == 1 else torch.Size(shape).numel()


@rule(
    "permute",
    "t",
    "T",
    "mT",
    "H",
    "mH",
    "adjoint",
    "transpose",
    "movedim",
    "numpy_T",
    flow=Flow.MOVES,
)
def permute(ctx: Context, input: Label, *dims: Any, **kwargs: Any) -> Any:
    """Axes in another order."""
    op = ctx.node.op if ctx.node is not None else "permute"
    ndim = len(input.shape)
    if op == "permute":
        order = kwargs.get("dims") or _flat(dims)
        return input.map(ctx.shape, lambda ids: ids.permute(*order))
    if op == "movedim":
        source, destination = kwargs.get("source", dims[:1]), kwargs.get("destination", dims[1:])
        source = _flat(source) if isinstance(source, tuple) else source
        destination = _flat(destination) if isinstance(destination, tuple) else destination
        return input.map(ctx.shape, lambda ids: ids.movedim(source, destination))
    if op == "transpose":
        first, second = (*dims, *(kwargs[name] for name in ("dim0", "dim1") if name in kwargs))
        return input.map(ctx.shape, lambda ids: ids.transpose(first, second))
    if op in ("mT", "mH", "adjoint"):
        return input.map(ctx.shape, lambda ids: ids.transpose(-1, -2))
    return input.map(ctx.shape, lambda ids: ids.permute(*reversed(range(ndim))))


@rule("expand", "expand_as", "broadcast_to", flow=Flow.MOVES)
def expand(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Any:
    """Copies along axes of size 1: ids broadcast as they are."""
    return input.map(ctx.shape, lambda ids: expand_dims(ids, len(ctx.shape)))


def _choose(ids: Tensor, index: list[Any]) -> Tensor:
    """ids[index] where an axis of size 1 stands for one along which nothing varies."""
    local: list[Any] = []
    axis = 0
    for part in index:
        if part is None:
            local.append(None)
            continue
        if ids.shape[axis] == 1:
            local.append(0 if isinstance(part, int) else slice(None))
        else:
            local.append(part)
        axis += 1
    return ids[tuple(local)]


def _select(ctx: Context, x: Label, axis: int, part: Any, shape: Sequence[int]) -> Label:
    index = [slice(None)] * len(x.shape)
    index[axis] = part
    return x.map(shape, lambda ids: _choose(ids, index))


@rule("piece", flow=Flow.MOVES)
def piece(ctx: Context, input: Any, index: int) -> Any:
    """One result of a call that gave several."""
    return input[index] if isinstance(input, tuple) else NotImplemented


@rule("getitem", flow=Flow.MOVES)
def getitem(ctx: Context, input: Any, index: Any) -> Any:
    """x[index] for integers, slices, None, Ellipsis and tensors of constants."""
    return input[index] if isinstance(input, tuple) else picked(ctx, input, index)


def picked(ctx: Context, x: Label, index: Any) -> Any:
    """The part of x that an index picks."""
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(_basic(item) for item in items):
        return _advanced(ctx, x, items)
    taken = sum(item is not None and item is not Ellipsis for item in items)
    rest = [slice(None)] * (len(x.shape) - taken)
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[at : at + 1] = rest
    shape = torch.empty(x.shape, device="meta")[tuple(items)].shape
    return x.map(shape, lambda ids: _choose(ids, items))


def _basic(item: Any) -> bool:
    plain = item is None or item is Ellipsis or isinstance(item, (int, slice))
    return plain and not isinstance(item, bool)


def _advanced(ctx: Context, x: Label, items: list[Any]) -> Any:
    """Indices that are tensors. Where the values are not known, any slice may be read.

    All slices of such an axis must scale alike; then it does not matter which one is.
    """
    if len(items) > 1 and _mask_not_known(ctx):
        return NotImplemented  # how many axes it takes is not seen here
    index: list[Any] = []
    anywhere: list[int] = []
    taken = sum(_axes_taken(ctx, item) for item in items)
    axis = 0
    for item in items:
        if isinstance(item, list) and any(isinstance(i, Label) for i in item):
            return NotImplemented
        value = ctx.value(item) if isinstance(item, Label) else item
        if value is None and item is not None:
            anywhere.append(axis)
            value = torch.zeros(item.shape, dtype=torch.int64)
        axis += len(x.shape) - taken if item is Ellipsis else _axes_taken(ctx, item)
        index.append(value)
    ctx.because("an index that is not known picks from it")
    uniform = ctx.system.uniform(x, anywhere)
    return moved(ctx, uniform, lambda ids: ids[tuple(index)])


_MASKS = (torch.bool, torch.uint8)


def _mask_not_known(ctx: Context) -> bool:
    nodes = instances(Node, ctx.node.args[1:2]) if ctx.node is not None else ()
    return any(
        isinstance(n.out, Spec) and n.out.dtype in _MASKS and ctx.trace.value(n) is None
        for n in nodes
    )


def _axes_taken(ctx: Context, item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    value = ctx.value(item) if isinstance(item, Label) else item
    is_mask = isinstance(value, Tensor) and value.dtype == torch.bool
    return int(value.ndim) if is_mask and value is not None else 1


@rule("index", flow=Flow.MOVES)
def index(ctx: Context, input: Label, indices: Any) -> Any:
    """x[indices] as ATen spells it: a list of tensors, None for a whole axis."""
    return _advanced(ctx, input, [slice(None) if item is None else item for item in indices])


def moved(ctx: Context, x: Label, move: Callable[[Tensor], Tensor]) -> Any:
    """Write the ids out in full and move them with the op itself."""
    if torch.Size(x.shape).numel() > MAX_IDS:
        return NotImplemented
    shape = move(torch.empty(1).expand(x.shape)).shape
    return x.map(shape, lambda ids: squeeze_constant(move(ids.expand(x.shape))))


@rule("select", "select_copy", flow=Flow.MOVES)
def select(ctx: Context, input: Label, dim: int, index: int) -> Any:
    """One slice of an axis, which goes away."""
    return _select(ctx, input, dim % len(input.shape), index, ctx.shape)


@rule("narrow", flow=Flow.MOVES)
def narrow(ctx: Context, input: Label, dim: int, start: Any, length: int) -> Any:
    """A range of an axis."""
    if isinstance(start, Label):
        return NotImplemented
    axis = dim % len(input.shape)
    start %= input.shape[axis]
    return _select(ctx, input, axis, slice(start, start + length), ctx.shape)


@rule("slice", flow=Flow.MOVES)
def slice_axis(
    ctx: Context, input: Label, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    """A range of an axis, with a step."""
    return _select(ctx, input, dim % len(input.shape), slice(start, end, step), ctx.shape)


@rule("chunk", "split", "tensor_split", "split_with_sizes", "unsafe_split", "unsafe_chunk",
      "hsplit", "vsplit", flow=Flow.MOVES)  # fmt: skip
def split(ctx: Context, input: Label, sections: Any = None, dim: int = 0, **kwargs: Any) -> Any:
    """Consecutive ranges of an axis; the results' shapes say which."""
    axis = dim % len(input.shape)
    op = ctx.node.op if ctx.node is not None else ""
    if op in ("hsplit", "vsplit"):
        axis = 1 if op == "hsplit" and len(input.shape) > 1 else 0
    parts, start = [], 0
    for spec in ctx.out:
        stop = start + spec.shape[axis]
        parts.append(_select(ctx, input, axis, slice(start, stop), spec.shape))
        start = stop
    return tuple(parts)


@rule("unbind", flow=Flow.MOVES)
def unbind(ctx: Context, input: Label, dim: int = 0) -> Any:
    """Every slice of an axis by itself."""
    axis = dim % len(input.shape)
    return tuple(_select(ctx, input, axis, i, spec.shape) for i, spec in enumerate(ctx.out))


@rule("index_select", flow=Flow.MOVES)
def index_select(ctx: Context, input: Label, dim: int, index: Label) -> Any:
    """Slices of an axis, picked by constants."""
    return selected(ctx, input, dim, index, ctx.shape)


def selected(ctx: Context, x: Label, dim: int, index: Label, shape: Sequence[int]) -> Label:
    """Slices of an axis of x, by the numbers in index; any of them where these are not known."""
    value = ctx.value(index)
    axis = dim % len(x.shape)
    if value is None:
        ctx.because("an index that is not known picks from it")
        x = ctx.system.uniform(x, [axis])
        value = torch.zeros(index.shape, dtype=torch.int64)
    return x.map(shape, lambda ids: ids.index_select(axis, value) if ids.shape[axis] > 1 else ids)


@rule("gather", flow=Flow.MOVES)
def gather(ctx: Context, input: Label, dim: int, index: Label, sparse_grad: bool = False) -> Any:
    """y[..., i, ...] = x[..., index[..., i, ...], ...]; see getitem for indices not known."""
    return gathered(ctx, input, dim, index)


def gathered(ctx: Context, x: Label, dim: int, index: Label) -> Any:
    """Entries of x along an axis, one for each entry of index."""
    axis = dim % len(x.shape) if x.shape else 0
    value = ctx.value(index)
    if value is None:
        ctx.because("an index that is not known picks from it")
        x = ctx.system.uniform(x, [axis] if x.shape else [])
        value = torch.zeros(index.shape, dtype=torch.int64)
    return moved(ctx, x, lambda ids: ids.gather(axis, value))


@rule("flip", "roll", "repeat", "tile", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle",
      "channel_shuffle", "native_channel_shuffle", "rot90", "fliplr", "flipud",
      "diagonal", flow=Flow.MOVES)  # fmt: skip
def rearrange(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Any:
    """Entries in other places, some of them more than once."""
    if any(isinstance(a, Label) for a in (*args, *kwargs.values())):
        return NotImplemented
    op = ctx.node.op if ctx.node is not None else ""
    function = getattr(torch.Tensor, op, None) or getattr(torch, op, None) or getattr(F, op)
    return moved(ctx, input, lambda ids: function(ids, *args, **kwargs))


@rule("as_strided", flow=Flow.MOVES)
def as_strided(
    ctx: Context, input: Label, size: Any, stride: Any, storage_offset: int | None = None
) -> Any:
    """Entries by their places in memory, all of which have to be the tensor's own."""
    node = ctx.node
    spec = node.args[0].out if node is not None and node.args else None
    if not isinstance(spec, Spec) or not spec.memory or (node is not None and node.inplace):
        return NotImplemented
    if not all(isinstance(n, int) for n in (*stride, storage_offset or 0)):
        return NotImplemented
    if max(torch.Size(x).numel() for x in (input.shape, ctx.shape)) > MAX_IDS:
        return NotImplemented
    plain = tuple(torch.Size(spec.shape[a + 1 :]).numel() for a in range(len(spec.shape)))
    strides, start = spec.layout or (plain, 0)
    own = _places(spec.shape, strides, start)
    wanted = _places(ctx.shape, stride, start if storage_offset is None else storage_offset)
    if not own.numel() or not wanted.numel():
        return NotImplemented
    entry = torch.full((int(max(own.max(), wanted.max())) + 1,), -1)
    entry[own] = torch.arange(own.numel())
    if not torch.equal(entry[own], torch.arange(own.numel())) or bool((entry[wanted] < 0).any()):
        return NotImplemented  # entries that share a place, or places beside the tensor's own
    index = entry[wanted].reshape(ctx.shape)
    return moved(ctx, input, lambda ids: ids.reshape(-1)[index])


def _places(size: Sequence[int], stride: Sequence[int], start: int) -> Tensor:
    """The place in memory of each entry of a tensor, in order."""
    places = torch.tensor([start])
    for n, step in zip(size, stride, strict=True):
        places = (places[:, None] + step * torch.arange(n)).reshape(-1)
    return places


@rule("unfold", flow=Flow.MOVES)
def unfold(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Any:
    """Windows of an image as columns: (N, C, H, W) to (N, C * kernel, positions)."""
    if len(ctx.shape) != 3 or len(input.shape) != 4:
        return NotImplemented
    x = ctx.system.uniform(input, (2, 3))
    kernel = ctx.shape[1] // x.shape[1]

    def repeat(ids: Tensor) -> Tensor:
        ids = ids.reshape(ids.shape[0], -1, 1)
        return ids.repeat_interleave(kernel, dim=1) if ids.shape[1] > 1 else ids

    return x.map(ctx.shape, repeat)


@rule("tril", "triu", flow=Flow.PASSES)
def triangle(ctx: Context, input: Label, diagonal: int = 0) -> Any:
    """Some entries become zero, which fits every scale."""
    return Label(ctx.shape, input.terms, input.wild)
