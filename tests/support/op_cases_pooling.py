"""Pooling, padding, interpolation, casts; ops that only the exported graph spells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.op_cases import OpCase, pos, x

aten = torch.ops.aten
POSITIONS = "positions share a scale"
_INPUTS = {1: x(1, 2, 6), 2: x(1, 2, 4, 4), 3: x(1, 2, 4, 4, 4)}


def pools() -> Iterator[OpCase]:
    for axes, a in _INPUTS.items():
        for name, args in {"max_pool": (2,), "avg_pool": (3, 1), "lp_pool": (2, 2),
                           "adaptive_max_pool": (2,),
                           "adaptive_avg_pool": (1,)}.items():  # fmt: skip
            one = pos(*a.shape) if name == "lp_pool" else a
            function = getattr(F, f"{name}{axes}d")
            yield OpCase(
                f"F.{name}{axes}d", lambda a, f=function, s=args: f(a, *s), (one,), POSITIONS, 2
            )
            layer = "".join(part.title() for part in name.split("_")).replace("Lp", "LP")
            module = getattr(nn, f"{layer}{axes}d")(*args)
            yield OpCase(f"nn.{layer}{axes}d", module, (one,), POSITIONS, 2)
        module = getattr(nn, f"MaxPool{axes}d")(2, return_indices=True)
        yield OpCase(f"nn.MaxPool{axes}d with indices", module, (a,), POSITIONS, 2)
        unpool = getattr(F, f"max_unpool{axes}d")
        yield OpCase(
            f"F.max_unpool{axes}d", lambda a, m=module, u=unpool: u(*m(a), 2), (a,), POSITIONS, 2
        )
        yield OpCase(
            f"max_pool{axes}d with padding",
            getattr(nn, f"MaxPool{axes}d")(3, 2, 1, ceil_mode=True),
            (a,),
            POSITIONS,
            2,
        )
        yield OpCase(
            f"avg_pool{axes}d with padding",
            getattr(nn, f"AvgPool{axes}d")(2, padding=1),
            (a,),
            POSITIONS,
            2,
        )
    for axes in (2, 3):
        module = getattr(nn, f"FractionalMaxPool{axes}d")(2, output_size=2)
        yield OpCase(f"nn.FractionalMaxPool{axes}d", module, (_INPUTS[axes],), POSITIONS, 2)
    yield OpCase("pool without batch", nn.MaxPool2d(2), (x(2, 4, 4),), POSITIONS, 2)
    yield OpCase(
        "aten.avg_pool2d", lambda a: aten.avg_pool2d.default(a, [2, 2]), (_INPUTS[2],), POSITIONS, 2
    )
    yield OpCase(
        "aten.adaptive_avg_pool2d",
        lambda a: aten.adaptive_avg_pool2d.default(a, [1, 1]),
        (_INPUTS[2],),
        POSITIONS,
        2,
    )
    yield OpCase(
        "aten.max_pool2d", lambda a: aten.max_pool2d.default(a, [2, 2]), (_INPUTS[2],), POSITIONS, 2
    )
    yield OpCase(
        "aten.max_pool2d_with_indices",
        lambda a: aten.max_pool2d_with_indices.default(a, [2, 2])[0],
        (_INPUTS[2],),
        POSITIONS,
        2,
    )


def paddings() -> Iterator[OpCase]:
    for amounts in ((1, 1), (0, 2), (1, 0, 1, 1), (0, 0, 1, 2), (-1, 0), (1, 1, 0, 0, 0, 1)):
        yield OpCase(
            f"F.pad{amounts}",
            lambda a, p=amounts: F.pad(a, p),
            (x(2, 2, 3),),
            "cropped or padded" if min(amounts) < 0 else "",
        )
        yield OpCase(
            f"F.pad{amounts} by one",
            lambda a, p=amounts: F.pad(a, p, value=1.0),
            (x(2, 2, 3),),
            "one value pins all",
        )
    for mode in ("reflect", "replicate", "circular"):
        yield OpCase(
            f"F.pad {mode}", lambda a, m=mode: F.pad(a, (1, 1), mode=m), (x(1, 2, 3),), POSITIONS, 2
        )
        yield OpCase(
            f"F.pad {mode} of images",
            lambda a, m=mode: F.pad(a, (1, 0, 0, 1), mode=m),
            (x(1, 2, 2, 2),),
            POSITIONS,
            2,
        )
    yield OpCase("nn.ZeroPad2d", nn.ZeroPad2d(1), (x(1, 2, 2, 2),))
    yield OpCase("nn.ConstantPad1d(0)", nn.ConstantPad1d(1, 0.0), (x(1, 2, 2),))
    yield OpCase(
        "nn.ConstantPad1d(1)", nn.ConstantPad1d(1, 1.0), (x(1, 2, 2),), "one value pins all", 0
    )
    yield OpCase("nn.ReflectionPad2d", nn.ReflectionPad2d(1), (x(1, 2, 2, 2),), POSITIONS, 2)
    yield OpCase(
        "channels padded by zeros", lambda a: F.pad(a, (0, 0, 0, 0, 1, 2)), (x(1, 2, 2, 1),)
    )


def resizing() -> Iterator[OpCase]:
    for mode, axes in (("nearest", 1), ("linear", 1), ("nearest", 2), ("bilinear", 2),
                       ("bicubic", 2),
                       ("area", 2), ("nearest-exact", 2), ("nearest", 3),
                       ("trilinear", 3)):  # fmt: skip
        a = x(1, 2, *(2,) * axes)
        yield OpCase(
            f"F.interpolate {mode} {axes}d",
            lambda a, m=mode: F.interpolate(a, scale_factor=2, mode=m),
            (a,),
            POSITIONS,
            2,
        )
    yield OpCase(
        "F.interpolate(size)",
        lambda a: F.interpolate(a, size=(3, 5), mode="bilinear", align_corners=True),
        (x(1, 2, 2, 2),),
        POSITIONS,
        2,
    )
    yield OpCase("nn.Upsample", nn.Upsample(scale_factor=2), (x(1, 2, 2, 2),), POSITIONS, 2)
    yield OpCase(
        "nn.UpsamplingBilinear2d",
        nn.UpsamplingBilinear2d(scale_factor=2),
        (x(1, 2, 2, 2),),
        POSITIONS,
        2,
    )
    sizes: dict[str, tuple[Any, ...]] = {
        "upsample_nearest1d": ([4],), "upsample_nearest2d": ([4, 3],),
        "upsample_nearest3d": ([3, 3, 3],),
        "_upsample_nearest_exact1d": ([4],), "_upsample_nearest_exact2d": ([4, 3],),
        "upsample_linear1d": ([4], False), "upsample_bilinear2d": ([4, 3], True),
        "upsample_trilinear3d": ([3, 3, 3], False), "upsample_bicubic2d": ([4, 3], False),
    }  # fmt: skip
    for name, args in sizes.items():
        function = getattr(aten, name).default
        yield OpCase(
            f"aten.{name}",
            lambda a, f=function, s=args: f(a, *s),
            (x(1, 2, *(2,) * len(args[0])),),
            POSITIONS,
            2,
        )
    grid = torch.rand(1, 2, 2, 2, dtype=torch.float64) - 0.5
    yield OpCase(
        "F.grid_sample",
        lambda a: F.grid_sample(a, grid, align_corners=False),
        (x(1, 2, 2, 2),),
        "no rule",
    )


def casts() -> Iterator[OpCase]:
    a = x(2, 3)
    for name, tolerance in {"float": 1e-6, "half": 3e-3, "bfloat16": 3e-2}.items():
        method = getattr(torch.Tensor, name)
        yield OpCase(f"x.{name}", lambda a, m=method: m(a).double(), (a,), "rounding", 6, tolerance)
    for name in ("long", "int", "short", "bool", "char", "byte"):
        method = getattr(torch.Tensor, name)
        yield OpCase(f"x.{name}", lambda a, m=method: m(a).double(), (10 * a.abs(),), "rounding", 0)
    yield OpCase("x.type(other)", lambda a: a.type(torch.float32), (a,), "rounding", 6, 1e-6)
    yield OpCase("x.to(float32)", lambda a: a.to(torch.float32), (a,), "rounding", 6, 1e-6)
    yield OpCase(
        "aten._to_copy(float32)",
        lambda a: aten._to_copy.default(a, dtype=torch.float32),
        (a,),
        "rounding",
        6,
        1e-6,
    )
    yield OpCase("x.type(integer)", lambda a: a.type(torch.int64), (a,), "rounding", 0)
    yield OpCase("aten.log_sigmoid", aten.log_sigmoid.default, (a,))


CASES = [*pools(), *paddings(), *resizing(), *casts()]
