"""Normalizations: of what a layer is given, and of weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.support.op_cases import OpCase, layer, pos, x
from tests.support.op_cases_linear import Twice

aten = torch.ops.aten


def normalizations() -> Iterator[OpCase]:
    """Inputs with the statistics of two or more entries, so that none is a constant."""
    for mode in (True, False):
        name = "training" if mode else "eval"
        yield OpCase(f"nn.BatchNorm1d {name}", layer(nn.BatchNorm1d(3)).train(mode), (x(4, 3),))
        yield OpCase(
            f"nn.BatchNorm1d on sequences {name}",
            layer(nn.BatchNorm1d(2)).train(mode),
            (x(2, 2, 3),),
        )
        yield OpCase(
            f"nn.BatchNorm2d {name}", layer(nn.BatchNorm2d(2)).train(mode), (x(2, 2, 2, 2),)
        )
        yield OpCase(
            f"nn.BatchNorm3d {name}", layer(nn.BatchNorm3d(2)).train(mode), (x(2, 2, 2, 1, 2),)
        )
        yield OpCase(
            f"nn.BatchNorm1d(affine=False) {name}",
            layer(nn.BatchNorm1d(3, affine=False)).train(mode),
            (x(4, 3),),
        )
        yield OpCase(
            f"nn.BatchNorm1d(no statistics) {name}",
            layer(nn.BatchNorm1d(3, track_running_stats=False)).train(mode),
            (x(4, 3),),
        )
        yield OpCase(
            f"nn.InstanceNorm1d(affine) {name}",
            layer(nn.InstanceNorm1d(2, affine=True, track_running_stats=True)).train(mode),
            (x(2, 2, 3),),
        )
    given = (x(4, 3), x(3), pos(3), x(3), x(3))
    statistics = "running statistics are inputs here"
    yield OpCase("F.batch_norm", F.batch_norm, given, statistics, 3)
    yield OpCase(
        "F.batch_norm training", lambda *t: F.batch_norm(*t, training=True), given, statistics, 3
    )
    yield OpCase(
        "torch.batch_norm",
        lambda a, m, v, w, b: torch.batch_norm(a, w, b, m, v, False, 0.1, 1e-5, False),
        given,
        statistics,
        3,
    )
    yield OpCase(
        "F.instance_norm",
        lambda a, w, b: F.instance_norm(a, weight=w, bias=b),
        (x(2, 2, 3), x(2), x(2)),
    )
    yield OpCase(
        "torch.instance_norm",
        lambda a, w, b: torch.instance_norm(a, w, b, None, None, True, 0.1, 1e-5, False),
        (x(2, 2, 3), x(2), x(2)),
    )
    yield OpCase("nn.InstanceNorm2d", nn.InstanceNorm2d(2), (x(1, 2, 2, 2),))
    yield OpCase("nn.GroupNorm", layer(nn.GroupNorm(2, 4)), (x(2, 4, 2),))
    yield OpCase("nn.GroupNorm(affine=False)", nn.GroupNorm(2, 4, affine=False), (x(2, 4, 2),))
    yield OpCase("F.group_norm", lambda a, w, b: F.group_norm(a, 1, w, b), (x(2, 2, 2), x(2), x(2)))
    yield OpCase(
        "F.group_norm, weight alone", lambda a, w: F.group_norm(a, 1, w), (x(2, 2, 2), x(2))
    )
    yield OpCase("nn.LayerNorm", layer(nn.LayerNorm(3)), (x(2, 3),))
    yield OpCase("nn.LayerNorm over two axes", layer(nn.LayerNorm((2, 3))), (x(2, 2, 3),))
    yield OpCase("nn.LayerNorm(bias=False)", layer(nn.LayerNorm(3, bias=False)), (x(2, 3),))
    yield OpCase(
        "nn.LayerNorm(affine=False)", nn.LayerNorm(3, elementwise_affine=False), (x(2, 3),)
    )
    yield OpCase("F.layer_norm", lambda a, w, b: F.layer_norm(a, (3,), w, b), (x(2, 3), x(3), x(3)))
    yield OpCase(
        "F.layer_norm, bias alone", lambda a, b: F.layer_norm(a, (3,), None, b), (x(2, 3), x(3))
    )
    yield OpCase("nn.RMSNorm", layer(nn.RMSNorm(3, eps=0.1)), (x(2, 3),))
    yield OpCase("F.rms_norm", lambda a, w: F.rms_norm(a, (3,), w, 0.1), (x(2, 3), x(3)))
    tiny = "epsilon is too small for numbers to see"
    yield OpCase("F.normalize", lambda a: F.normalize(a, dim=1), (x(2, 3),), tiny, 0)
    yield OpCase("F.cosine_similarity", F.cosine_similarity, (x(2, 3), x(2, 3)), tiny, 0)
    by_names = F.cosine_similarity
    yield OpCase("cosine by names", lambda a, b: by_names(a, x2=b), (x(2, 3), x(2, 3)), tiny, 0)
    yield OpCase("nn.CosineSimilarity", nn.CosineSimilarity(dim=0), (x(2, 3), x(2, 3)), tiny, 0)
    yield OpCase("nn.LocalResponseNorm", nn.LocalResponseNorm(2), (x(1, 3, 2),))
    constant = nn.LayerNorm(3)
    constant.weight = None  # type: ignore[assignment]
    yield OpCase("nn.LayerNorm twice, bias alone", layer(Twice(constant)), (x(2, 3),))


def weight_norms() -> Iterator[OpCase]:
    """w = g v / |v|."""
    for dim, size in ((0, (3, 1, 1)), (1, (1, 2, 1)), (2, (1, 1, 2))):
        given = (x(3, 2, 2), x(*size))
        yield OpCase(
            f"weight_norm dim {dim}", lambda v, g, d=dim: torch._weight_norm(v, g, d), given
        )
        yield OpCase(
            f"aten.weight_norm dim {dim}",
            lambda v, g, d=dim: aten._weight_norm.default(v, g, d),
            given,
        )
        yield OpCase(
            f"norm_except_dim {dim}", lambda v, d=dim: torch.norm_except_dim(v, 2, d), given[:1]
        )
        yield OpCase(f"w times norm_except_dim {dim}", _times_norm(dim), given[:1])
    yield OpCase("weight_norm of all", lambda v, g: torch._weight_norm(v, g, -1), (x(3, 2), x()))
    yield OpCase("weight_norm of twice v", lambda v, g: torch._weight_norm(v * 2, g), _GIVEN)
    yield OpCase(
        "weight_norm to the power of two", lambda v, g: torch._weight_norm(v, g * g), _GIVEN
    )
    yield OpCase("norm_except_dim of all", lambda v: torch.norm_except_dim(v, 2, -1), (x(3, 2),))
    # Along an inner axis only: along the first or last, torch reads past the end of such a g.
    yield OpCase(
        "weight_norm, one g for all slices",
        lambda v, g: torch._weight_norm(v, g, 1),
        (x(3, 2, 2), x(1, 1, 1)),
        "rarely met",
        0,
    )
    yield OpCase(
        "norm_except_dim(0)", lambda v: torch.norm_except_dim(v, 0, 0), (x(3, 2),), "counts"
    )
    by_torch = {"parametrization": parametrizations.weight_norm, "hook": nn.utils.weight_norm}
    for kind, normed in by_torch.items():
        for options in ({}, {"dim": 1}, {"dim": None}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the hook is deprecated
                made = normed(nn.Linear(3, 2), **options)
            # Torch makes the weight of the hook in float32, and anew in each call.
            yield OpCase(f"nn.Linear, weight_norm by {kind} {options}", layer(made), (x(2, 3),))


_GIVEN = (x(3, 2), x(3, 1))


def _times_norm(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda v: v * torch.norm_except_dim(v, 2, dim)


CASES = [*normalizations(), *weight_norms()]
