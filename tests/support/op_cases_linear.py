"""Layers with weights: linear, convolutions, embeddings, attention, products."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.op_cases import OpCase, layer, spell, x

aten = torch.ops.aten
POSITIONS = "positions share a scale"


def linear_layers() -> Iterator[OpCase]:
    for shape in ((3,), (2, 3), (2, 2, 3)):
        yield OpCase(f"nn.Linear on {shape}", layer(nn.Linear(3, 2)), (x(*shape),))
        yield OpCase(
            f"nn.Linear without bias on {shape}", layer(nn.Linear(3, 4, bias=False)), (x(*shape),)
        )
    yield OpCase("F.linear", F.linear, (x(2, 3), x(4, 3), x(4)))
    yield OpCase("F.linear without bias", F.linear, (x(2, 3), x(4, 3)))
    yield OpCase("F.linear to a number without bias", F.linear, (x(2, 3), x(3)))
    yield OpCase(
        "F.linear by names", lambda a, w, b: F.linear(a, weight=w, bias=b), (x(2, 3), x(2, 3), x(2))
    )
    yield OpCase(
        "F.linear of a transposed weight", lambda a, w: F.linear(a, w.t()), (x(2, 3), x(3, 2))
    )
    yield OpCase("aten.linear", aten.linear.default, (x(2, 3), x(4, 3), x(4)))
    yield OpCase("one layer twice", layer(Twice(nn.Linear(3, 3))), (x(2, 3),))
    yield OpCase("nn.Bilinear", layer(nn.Bilinear(2, 3, 2)), (x(2, 2), x(2, 3)))
    yield OpCase("F.bilinear", F.bilinear, (x(2, 2), x(2, 3), x(2, 2, 3), x(2)))
    yield OpCase("F.bilinear without bias", F.bilinear, (x(1, 2), x(1, 2), x(2, 2, 2)))
    ids = torch.tensor([[0, 2], [1, 2]])
    rows = "which rows are read is not known"
    yield OpCase("nn.Embedding", layer(nn.Embedding(3, 2)), (ids,), rows, 2)
    yield OpCase(
        "nn.Embedding(padding_idx)", layer(nn.Embedding(3, 2, padding_idx=0)), (ids,), rows, 2
    )
    yield OpCase(
        "nn.Embedding(max_norm)",
        layer(nn.Embedding(3, 2, max_norm=0.5)),
        (ids,),
        "not a number of the weight alone",
        0,
    )
    yield OpCase("F.embedding", F.embedding, (ids, x(3, 2)), rows, 2)
    yield OpCase("torch.embedding", torch.embedding, (x(3, 2), ids), rows, 2)
    yield OpCase("aten.embedding", aten.embedding.default, (x(3, 2), ids), rows, 2)
    yield from _bags(ids, rows)


def _bags(ids: Tensor, rows: str) -> Iterator[OpCase]:
    flat, starts = ids.reshape(-1), torch.tensor([0, 3])
    for mode in ("sum", "mean", "max"):
        bag = layer(nn.EmbeddingBag(3, 2, mode=mode))
        yield OpCase(f"nn.EmbeddingBag({mode})", bag, (ids,), rows, 2)
        yield OpCase(f"nn.EmbeddingBag({mode}) with offsets", bag, (flat, starts), rows, 2)
    capped = layer(nn.EmbeddingBag(3, 2, max_norm=0.5))
    yield OpCase("nn.EmbeddingBag(max_norm)", capped, (ids,), "not a number of the weight alone", 0)
    # Columns of the weight, and the numbers of a bag.
    yield OpCase("F.embedding_bag with numbers", _weighted_bags, (x(3, 2), ids, x(2, 2)), rows, 4)
    yield OpCase(
        "F.embedding_bag with numbers and offsets",
        lambda w, i, o, s: F.embedding_bag(i, w, o, None, 2.0, False, "sum", False, s),
        (x(3, 2), flat, starts, x(4)),
        "which entries share a bag is not known",
        3,
    )
    yield OpCase(
        "torch.embedding_bag",
        lambda w, i, o, s: torch.embedding_bag(w, i, o, False, 0, False, s)[0],
        (x(3, 2), flat, starts, x(4)),
        "which entries share a bag is not known",
        3,
    )
    yield OpCase(
        "aten.embedding_bag",
        lambda w, i, o: aten.embedding_bag.default(w, i, o, False, 1)[0],
        (x(3, 2), flat, starts),
        rows,
        2,
    )


def _weighted_bags(weight: Tensor, ids: Tensor, numbers: Tensor) -> Tensor:
    return F.embedding_bag(ids, weight, per_sample_weights=numbers, mode="sum")


class Twice(nn.Module):
    """A layer, a ReLU and the same layer again."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, a: Tensor) -> Tensor:
        return self.inner(self.inner(a).relu())


def convolutions() -> Iterator[OpCase]:
    options: tuple[dict[str, Any], ...] = (
        {}, {"stride": 2}, {"padding": 1}, {"dilation": 2}, {"groups": 2}, {"groups": 4},
        {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular", "groups": 2},
        {"padding": 2, "padding_mode": "replicate", "stride": 2},
    )  # fmt: skip
    for kind in options:
        groups = kind.get("groups", 1)
        outputs = 4 if groups < 4 else 8
        yield OpCase(
            f"nn.Conv1d({kind})",
            layer(nn.Conv1d(4, outputs, 3, **kind)),
            (x(1, 4, 6),),
            POSITIONS,
            4 + outputs,
        )
        yield OpCase(
            f"nn.Conv1d({kind}) without bias",
            layer(nn.Conv1d(4, outputs, 3, bias=False, **kind)),
            (x(1, 4, 6),),
            POSITIONS,
            4 + outputs,
        )
    for kind in options[:6]:
        groups = kind.get("groups", 1)
        small = {**kind, "groups": min(groups, 2)}
        yield OpCase(
            f"nn.Conv2d({kind})", layer(nn.Conv2d(2, 2, 2, **small)), (x(2, 2, 4, 3),), POSITIONS, 4
        )
        yield OpCase(
            f"nn.Conv3d({kind})",
            layer(nn.Conv3d(2, 2, 1, **{**small, "dilation": 1})),
            (x(1, 2, 2, 2, 2),),
            POSITIONS,
            4,
        )
    yield OpCase("nn.Conv1d with bias, complete", layer(nn.Conv1d(2, 2, 2)), (x(1, 2, 4),))
    yield OpCase(
        "nn.Conv1d(groups) with bias, complete", layer(nn.Conv1d(4, 2, 2, groups=2)), (x(1, 4, 4),)
    )
    yield OpCase("nn.Conv2d without batch", layer(nn.Conv2d(2, 3, 2)), (x(2, 3, 3),), POSITIONS, 5)
    yield OpCase("nn.Conv2d 1x1 on two samples", layer(nn.Conv2d(2, 3, 1)), (x(2, 2, 1, 1),))
    yield OpCase(
        "F.conv1d", lambda a, w, b: F.conv1d(a, w, b), (x(2, 2, 4), x(3, 2, 2), x(3)), POSITIONS, 5
    )
    yield OpCase(
        "F.conv2d",
        lambda a, w: F.conv2d(a, w, None, 1, 1, 1, 2),
        (x(1, 4, 2, 2), x(4, 2, 2, 2)),
        POSITIONS,
        8,
    )
    yield OpCase(
        "F.conv3d",
        lambda a, w: F.conv3d(a, w, groups=2),
        (x(1, 2, 2, 2, 1), x(2, 1, 1, 1, 1)),
        POSITIONS,
        4,
    )
    yield OpCase(
        "torch.conv1d",
        lambda a, w: torch.conv1d(a, w, stride=2),
        (x(1, 2, 5), x(2, 2, 2)),
        POSITIONS,
        4,
    )
    yield OpCase(
        "aten.conv2d",
        lambda a, w, b: aten.conv2d.default(a, w, b, [1, 1], [1, 1]),
        (x(1, 1, 2, 2), x(2, 1, 3, 3), x(2)),
        POSITIONS,
        3,
    )
    transposed: tuple[dict[str, Any], ...] = (
        {}, {"stride": 2}, {"padding": 1}, {"groups": 2}, {"groups": 4}, {"dilation": 2},
        {"stride": 2, "output_padding": 1}, {"groups": 2, "stride": 3, "output_padding": 2},
    )  # fmt: skip
    for kind in transposed:
        yield OpCase(
            f"nn.ConvTranspose1d({kind})",
            layer(nn.ConvTranspose1d(4, 4, 3, **kind)),
            (x(1, 4, 4),),
            POSITIONS,
            8,
        )
        few = {**kind, "groups": min(2, kind.get("groups", 1))}
        yield OpCase(
            f"nn.ConvTranspose2d({kind})",
            layer(nn.ConvTranspose2d(2, 4, 2, **few)),
            (x(2, 2, 2, 3),),
            POSITIONS,
            6,
        )
    yield OpCase(
        "nn.ConvTranspose3d",
        layer(nn.ConvTranspose3d(2, 2, 2, groups=2)),
        (x(1, 2, 2, 2, 2),),
        POSITIONS,
        4,
    )
    yield OpCase(
        "nn.ConvTranspose1d with bias, complete", layer(nn.ConvTranspose1d(2, 2, 2)), (x(1, 2, 3),)
    )
    yield OpCase(
        "F.conv_transpose1d",
        lambda a, w: F.conv_transpose1d(a, w, groups=2),
        (x(1, 4, 3), x(4, 2, 2)),
        POSITIONS,
        8,
    )
    yield OpCase(
        "F.conv_transpose2d",
        lambda a, w, b: F.conv_transpose2d(a, w, b),
        (x(1, 2, 2, 2), x(2, 3, 1, 1), x(3)),
        POSITIONS,
        5,
    )
    yield OpCase(
        "F.conv_transpose3d", F.conv_transpose3d, (x(1, 2, 1, 1, 2), x(2, 1, 1, 1, 1)), POSITIONS, 3
    )
    yield OpCase(
        "x.unsqueeze, nn.Conv1d, one channel at a time",
        _channels_apart,
        (x(2, 2, 4), x(1, 1, 2)),
        POSITIONS,
    )


def _channels_apart(a: Tensor, w: Tensor) -> Tensor:
    return torch.cat([F.conv1d(a[:, i : i + 1], w) for i in range(2)], 1)


def products() -> Iterator[OpCase]:
    for a, b in (
        ((2, 3), (3, 2)), ((3,), (3, 2)), ((2, 3), (3,)), ((3,), (3,)), ((2, 2, 3), (3, 2)),
        ((2, 2, 3), (2, 3, 2)), ((2, 3), (2, 3, 1)), ((1, 2, 2), (2, 2, 1)), ((2, 2, 3), (3,)),
    ):  # fmt: skip
        yield OpCase(f"matmul {a} {b}", torch.matmul, (x(*a), x(*b)))
        yield OpCase(f"operator @ {a} {b}", lambda a, b: a @ b, (x(*a), x(*b)))
    for name, a, b in (
        ("mm", (2, 3), (3, 2)), ("bmm", (2, 1, 3), (2, 3, 2)), ("mv", (2, 3), (3,)),
        ("dot", (3,), (3,)),
    ):  # fmt: skip
        yield from spell(name, inputs=(x(*a), x(*b)))
    own = nn.ParameterList([nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))])

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = own[0], own[1]

        def forward(self, a: Tensor) -> Tensor:
            return a @ self.w + self.b

    yield OpCase("x @ self.w + self.b", layer(Own()), (x(2, 3),))
    yield OpCase("relu(x) @ y", lambda a, b: a.relu() @ b, (x(2, 3), x(3, 2)))
    yield OpCase("x @ x.T", lambda a: a @ a.T, (x(2, 3),))
    for name, shapes in {
        "addmm": ((2, 2), (2, 3), (3, 2)), "addmv": ((2,), (2, 3), (3,)),
        "baddbmm": ((2, 1, 2), (2, 1, 3), (2, 3, 2)),
    }.items():  # fmt: skip
        yield from spell(name, inputs=tuple(x(*s) for s in shapes))
        yield from spell(name, inputs=tuple(x(*s) for s in shapes), beta=0.5, alpha=-2)
    yield from spell("addbmm", inputs=(x(1, 2), x(2, 1, 3), x(2, 3, 2)), slack="no rule")
    for equation, *shapes in (
        ("ij,jk->ik", (2, 3), (3, 2)), ("bij,bjk->bik", (2, 1, 3), (2, 3, 2)),
        ("ij,ij->i", (2, 3), (2, 3)),
        ("ij->ji", (2, 3)), ("ij->i", (2, 3)), ("ij->", (2, 3)), ("i,j->ij", (2,), (3,)),
        ("ni,oi->no", (2, 3), (2, 3)), ("i,i,i->i", (3,), (3,), (3,)),
        ("nhqd,nhkd->nhqk", (1, 2, 2, 2), (1, 2, 1, 2)),
        ("i j, j -> i", (2, 3), (3,)), ("ia,ja,ka->ijk", (2, 2), (1, 2), (2, 2)),
    ):  # fmt: skip
        yield OpCase(
            f"einsum {equation}",
            lambda *t, e=equation: torch.einsum(e, *t),
            tuple(x(*s) for s in shapes),
        )
    yield OpCase(
        "einsum, size 1 against 3", lambda a, b: torch.einsum("ij,jk->ik", a, b), (x(2, 1), x(3, 2))
    )
    yield OpCase(
        "einsum of a list", lambda a, b: torch.einsum("ij,jk->ik", [a, b]), (x(2, 3), x(3, 2))
    )
    for equation in ("ii->i", "...i->...", "ij,jk"):
        count = equation.count(",") + 1
        yield OpCase(
            f"einsum {equation}",
            lambda *t, e=equation: torch.einsum(e, *t),
            tuple(x(3, 3) for _ in range(count)),
            "declined",
        )


def grouped_products() -> Iterator[OpCase]:
    """transformers' own kernel, which takes float64; none where that library is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return
    importlib.import_module("transformers.integrations.moe")
    grouped = torch.ops.transformers.grouped_mm_fallback
    ends, unknown = torch.tensor([2, 2, 6], dtype=torch.int32), "which rows meet which is not known"

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(x(3, 2, 4)), nn.Parameter(x(3, 3, 4))

        def forward(self, a: Tensor, ends: Tensor) -> Tensor:
            return grouped(grouped(a, self.up, ends).relu(), self.down.mT, offs=ends)

    # Rows of a, columns of w and what they share; less one that none of them notices.
    yield OpCase("grouped_mm", grouped, (x(6, 3), x(3, 3, 2), ends), unknown, 6 + 3 + 2 - 1)
    yield OpCase(
        "grouped_mm, overload", grouped.default, (x(6, 3), x(3, 3, 2), ends), unknown, 6 + 3 + 2 - 1
    )
    yield OpCase("experts", Experts(), (x(6, 2), ends), unknown, 6 + 2 + 4 + 3 - 1)


def attention() -> Iterator[OpCase]:
    q, k, v = x(1, 2, 2, 3), x(1, 2, 3, 3), x(1, 2, 3, 2)
    yield OpCase("attention", F.scaled_dot_product_attention, (q, k, v))
    yield OpCase(
        "attention without heads", F.scaled_dot_product_attention, (x(2, 3), x(2, 3), x(2, 2))
    )
    yield OpCase(
        "attention, causal",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        (x(1, 3, 2), x(1, 3, 2), x(1, 3, 2)),
        "what comes first attends to itself alone",
        4,
    )
    yield OpCase(
        "attention with a mask",
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        (q, k, v, x(2, 3)),
    )
    yield OpCase(
        "attention, grouped heads",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        (x(1, 4, 1, 2), x(1, 2, 2, 2), x(1, 2, 2, 2)),
    )
    yield OpCase(
        "attention by hand", lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v, (q, k, v)
    )
    positions = "positions share a scale"
    for options in (
        {},
        {"bias": False},
        {"batch_first": True},
        {"add_bias_kv": True},
        {"kdim": 3, "vdim": 2},
    ):
        module = _Attention(**options)
        width = (4, options.get("kdim", 4), options.get("vdim", 4))
        inputs = tuple(x(2, 3, n) for n in width)
        yield OpCase(
            f"nn.MultiheadAttention({options})", layer(module), inputs, positions, 12 + sum(width)
        )
    yield OpCase("self attention", layer(_SelfAttention()), (x(2, 3, 4),), positions, 16)


class _Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **options)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.attention(q, k, v)[0]


class _SelfAttention(_Attention):
    def forward(self, q: Tensor) -> Any:  # type: ignore[override]
        return self.attention(q, q, q, need_weights=False)[0]


CASES = [
    *linear_layers(), *convolutions(), *products(), *grouped_products(),
    *attention(),
]  # fmt: skip
