"""Which entries of its operands a sum of products, a normalization or a pooling reads.

Where some entries of a result do not matter, or an operand is zero in places that are known, not
all of a weight reaches an output. One function a family; an op without one reads all that it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from enorm_fx.rules.boxes import Box, Places, both, each, everything, some
from enorm_fx.tracing.trace import Node, Spec


@dataclass(frozen=True, slots=True)
class Read:
    """One call.

    arguments: by the names that the op's rule gives them, Nodes for tensors.
    live:      the entries of the result that reach an output; shape: of the result.
    nonzero:   by node index a box outside of which a tensor is zero.
    """

    arguments: Mapping[str, Any]
    live: Box
    shape: tuple[int, ...]
    nonzero: Mapping[int, Box]

    def shape_of(self, name: str) -> tuple[int, ...]:
        out: Spec = self.arguments[name].out
        return out.shape

    def places(self, name: str, axis: int) -> Places:
        """The places along an axis of an operand where it may be different from zero."""
        node: Node = self.arguments[name]
        return self.nonzero.get(node.index, everything(node.out.shape)).axes[axis]


Reader = Callable[[Read], dict[str, Box]]
READERS: dict[str, Reader] = {}


def _reader(*keys: str) -> Callable[[Reader], Reader]:
    def register(function: Reader) -> Reader:
        READERS.update(dict.fromkeys(keys, function))
        return function

    return register


@_reader("linear")
def _linear(call: Read) -> dict[str, Box]:
    """y[..., o] reads row o of the weight, at the columns where x is not zero."""
    columns = call.places("input", -1)
    if len(call.shape_of("weight")) == 1:
        return {"weight": Box((columns,)), "input": Box((*call.live.axes, None))}
    rows = call.live.axes[-1]
    return {
        "input": Box((*call.live.axes[:-1], None)),
        "weight": Box((rows, columns)),
        "bias": Box((rows,)),
    }


@_reader("conv1d", "conv2d", "conv3d")
def _conv(call: Read) -> dict[str, Box]:
    """Output channel o reads row o of the weight, where the inputs of its group are not zero."""
    groups = call.arguments["groups"]
    outputs, _, *kernel = call.shape_of("weight")
    channel = len(call.shape) - 1 - len(kernel)
    out, into = call.live.axes[channel], call.places("input", channel)
    fed = each(some(into, groups), outputs // groups)
    inputs = call.shape_of("input")
    needed = each(some(out, groups), inputs[channel] // groups)
    return {
        "input": Box((*call.live.axes[:channel], needed, *[None] * len(kernel))),
        "weight": Box((both(out, fed), into if groups == 1 else None, *[None] * len(kernel))),
        "bias": Box((out,)),
    }


@_reader("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(call: Read) -> dict[str, Box]:
    """Input channel i feeds, through row i of the weight, the outputs of its group."""
    groups = call.arguments["groups"]
    inputs, _, *kernel = call.shape_of("weight")
    channel = len(call.shape) - 1 - len(kernel)
    out, into = call.live.axes[channel], call.places("input", channel)
    needed = each(some(out, groups), inputs // groups)
    return {
        "input": Box((*call.live.axes[:channel], needed, *[None] * len(kernel))),
        "weight": Box((both(into, needed), out if groups == 1 else None, *[None] * len(kernel))),
        "bias": Box((out,)),
    }


@_reader("matmul", "mm", "bmm")
def _matmul(call: Read) -> dict[str, Box]:
    """y[..., m, n] reads row m of x and column n of w, where the other one is not zero."""
    x, w = call.shape_of("input"), call.shape_of("other")
    if len(x) < 2 or len(w) < 2:
        return {}
    rows, columns = call.live.axes[-2:]
    return {
        "input": Box((*[None] * (len(x) - 2), rows, call.places("other", -2))),
        "other": Box((*[None] * (len(w) - 2), call.places("input", -1), columns)),
    }


@_reader("grouped_mm")
def _grouped_matmul(call: Read) -> dict[str, Box]:
    """y[t, n] reads row t of x and column n of each of the matrices."""
    rows, columns = call.live.axes
    return {
        "input": Box((rows, call.places("mat2", 1))),
        "mat2": Box((None, call.places("input", 1), columns)),
    }


@_reader("prelu")
def _prelu(call: Read) -> dict[str, Box]:
    """One slope, or one a channel."""
    slopes = call.shape_of("weight")
    several = bool(slopes) and slopes[0] > 1 and len(call.shape) > 1
    own = call.live.axes[1] if several else None
    return {"input": call.live, "weight": Box((own,) * len(slopes))}


@_reader("embedding")
def _embedding(call: Read) -> dict[str, Box]:
    """Any row may be read, at the places that matter."""
    return {"weight": Box((None, call.live.axes[-1]))}


@_reader("batch_norm", "instance_norm", "group_norm")
def _channels(call: Read) -> dict[str, Box]:
    """gamma and beta of the channels that matter."""
    own = Box((call.live.axes[1],))
    return {"weight": own, "bias": own}


@_reader("layer_norm", "rms_norm")
def _last_axes(call: Read) -> dict[str, Box]:
    """gamma and beta of the entries that matter."""
    if call.arguments.get("weight") is None:
        return {}
    own = Box(call.live.axes[len(call.shape) - len(call.shape_of("weight")) :])
    return {"weight": own, "bias": own}


@_reader("weight_norm")
def _weight_norm(call: Read) -> dict[str, Box]:
    """The slices that matter, each of them whole."""
    dim = call.arguments["dim"]
    own = Box(tuple(p if a == dim else None for a, p in enumerate(call.live.axes)))
    return {"v": own, "g": own} if call.shape_of("g") else {"v": own}


@_reader("scaled_dot_product_attention")
def _attention(call: Read) -> dict[str, Box]:
    """The result has the last axis of the values."""
    value = call.shape_of("value")
    return {"value": Box((*[None] * (len(value) - 1), call.live.axes[-1]))}


def axes_gone(dim: Any, ndim: int) -> set[int] | None:
    """The axes that a reduction along `dim` takes away, of so many; None: all."""
    if dim is None or dim == () or not ndim:
        return None
    return {d % ndim for d in (dim if isinstance(dim, (tuple, list)) else [dim])}


@_reader("mean", "sum", "nanmean", "nansum", "amax", "amin", "norm", "vector_norm")
def _reduction(call: Read) -> dict[str, Box]:
    """Along the axes that stay only what matters is read."""
    shape = call.shape_of("input")
    gone = axes_gone(call.arguments["dim"], len(shape))
    if gone is None:
        return {}
    if len(call.shape) == len(shape):
        axes = [None if a in gone else p for a, p in enumerate(call.live.axes)]
    else:
        left = iter(call.live.axes)
        axes = [None if a in gone else next(left) for a in range(len(shape))]
    return {"input": Box(tuple(axes))}


@_reader("cumsum", "cummax", "cummin")
def _accumulation(call: Read) -> dict[str, Box]:
    """Entries are accumulated along one axis."""
    axes = list(call.live.axes)
    if axes:
        axes[call.arguments["dim"]] = None
    return {"input": Box(tuple(axes))}


def _pooling(axes: int) -> Reader:
    def read(call: Read) -> dict[str, Box]:
        """Windows lie within a channel."""
        return {"input": Box((*call.live.axes[: len(call.shape) - axes], *[None] * axes))}

    return read


for _axes in (1, 2, 3):
    for _name in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "lp_pool"):
        READERS[f"{_name}{_axes}d"] = _pooling(_axes)
