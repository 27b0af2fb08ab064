"""Pooling, padding and interpolation: every output mixes positions of one channel."""

from __future__ import annotations

from typing import Any

from enorm_fx.rules.join import side_by_side
from enorm_fx.rules.registry import Context, Flow, rule
from enorm_fx.symmetry.labels import Label


def _with_indices(ctx: Context, label: Label) -> Any:
    """Pooling that also returns indices: those carry no scale."""
    if isinstance(ctx.out, tuple):
        return (label, *(Label(spec.shape) for spec in ctx.out[1:]))
    return label


def _over_space(ctx: Context, x: Label, axes: int) -> Label:
    uniform = ctx.system.uniform(x, range(len(x.shape) - axes, len(x.shape)))
    return Label(ctx.shape, uniform.terms)


_POOLS = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "lp_pool",
          "fractional_max_pool", "max_unpool")  # fmt: skip


def _pool(axes: int) -> Any:
    def pool(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Any:
        """Maxima, means and l_p norms of windows scale with the channel that they are taken of."""
        return _with_indices(ctx, _over_space(ctx, input, axes))

    return pool


for _axes in (1, 2, 3):
    _names = [f"{name}{_axes}d" for name in _POOLS]
    rule(*(name for name in _names if name != "fractional_max_pool1d"))(_pool(_axes))


@rule("fold", "grid_sample")
def resample(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Any:
    """Declined here: the axes change their meaning."""
    return NotImplemented


@rule("interpolate", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
      "upsample_nearest_exact1d", "upsample_nearest_exact2d", "upsample_linear1d",
      "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d")  # fmt: skip
def interpolate(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Label:
    """Every output is a weighted mean of positions of one channel."""
    return _over_space(ctx, input, len(input.shape) - 2)


@rule("pad", flow=Flow.MOVES)
def pad(ctx: Context, input: Label, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    """Zeros fit every scale; copies of the border keep theirs; another constant pins.

    An axis of channels (the second one, or one along which the label varies) gets a scale of
    its own for each slice of zeros that is added.
    """
    if mode != "constant":
        return _over_space(ctx, input, len(pad) // 2)
    if value:
        ctx.pin(input, f"it is padded with {value}")
        return Label(ctx.shape, ctx.pinned(ctx.shape, "padding").terms)
    label = input
    for i in range(0, len(pad), 2):
        axis = len(input.shape) - 1 - i // 2
        before, after = pad[i], pad[i + 1]
        shape = (*label.shape[:axis], label.shape[axis] + before + after, *label.shape[axis + 1 :])
        if min(before, after) < 0 and label.varies(axis):
            return NotImplemented
        if not (before or after):
            continue
        if label.varies(axis) or (axis == 1 and len(shape) > 2 and min(before, after) >= 0):
            zeros = [
                Label((*shape[:axis], n, *shape[axis + 1 :]), wild=True) for n in (before, after)
            ]
            parts = [x for x in (zeros[0], label, zeros[1]) if x.shape[axis]]
            label = side_by_side(ctx, parts, axis, shape)
        else:
            label = Label(shape, label.terms)
    return label
