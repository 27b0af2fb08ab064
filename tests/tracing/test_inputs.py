"""What a model may be given to be traced with, and the two ways of tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enorm_fx import analyze
from enorm_fx.errors import ArgumentError, TraceError
from enorm_fx.tracing import trace
from tests.support.laws import ROUNDING, largest_change, randomized
from tests.support.tracing_kit import ROWS, L, plain, sound, structure, two_layers
from tests.support.zoo_small import ZOO, Small


def flexible(m: Any, x: Tensor, scale: Any = None, flip: bool = False) -> Tensor:
    if not isinstance(x, Tensor):
        x = x["x"] if isinstance(x, dict) else x[0]
    y = m.b(m.a(x).relu())
    y = -y if flip else y
    return y if scale is None else y * scale


class Flexible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = L(3, 4), L(4, 2)

    def forward(self, x: Any, scale: Any = None, flip: bool = False) -> Tensor:
        return flexible(self, x, scale, flip)


@pytest.mark.parametrize(
    "inputs",
    [
        None,
        torch.randn(5, 3),
        (torch.randn(5, 3),),
        (torch.randn(5, 3), 2.0),
        (torch.randn(5, 3), torch.randn(2)),
        (torch.randn(5, 3), None, True),
        {"x": torch.randn(5, 3)},
        {"x": torch.randn(5, 3), "flip": True},
        ({"x": torch.randn(5, 3)},),
        ([torch.randn(5, 3)],),
        torch.randn(3),
    ],
)
def test_example_inputs_of_every_kind(inputs: Any) -> None:
    assert analyze(Flexible(), inputs).num_scales == 4


@pytest.mark.parametrize("inputs", ["x", 3, [torch.randn(5, 3)], {1: torch.randn(5, 3)}])
def test_example_inputs_of_no_such_kind(inputs: Any) -> None:
    with pytest.raises(ArgumentError, match="example_inputs must be"):
        analyze(Flexible(), inputs)


def test_inputs_that_the_model_refuses() -> None:
    with pytest.raises(TraceError, match=r"float32 \(5, 7\)") as error:
        analyze(Flexible(), torch.randn(5, 7), tracer="symbolic")
    assert "Pass example_inputs" in str(error.value)
    with pytest.raises(TraceError, match=r"forward\(\)"):
        analyze(Flexible(), {"y": torch.randn(5, 3)}, tracer="symbolic")


def test_shapes_are_inferred_where_one_input_is_needed() -> None:
    assert analyze(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))).num_scales == 4
    assert analyze(nn.Sequential(nn.Embedding(7, 4), nn.ReLU(), L(4, 2))).num_scales == 4
    assert analyze(nn.Sequential(nn.Conv1d(2, 3, 9), nn.ReLU(), nn.Conv1d(3, 1, 2))).num_scales == 3
    with pytest.raises(ArgumentError, match="takes 2 inputs"):
        analyze(nn.Bilinear(2, 3, 4))
    with pytest.raises(TraceError, match="pass example_inputs"):
        analyze(nn.ReLU())


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(L(3, 4), nn.ReLU(), L(4, 2))
        inputs = torch.empty(5, 3)
    plan = analyze(model, inputs)
    assert plan.num_scales == 4
    assert structure(plan) == structure(analyze(nn.Sequential(L(3, 4), nn.ReLU(), L(4, 2))))


def test_star_args_and_type_checks() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = L(3, 4), L(4, 2)

        def forward(self, *inputs: Any, **options: Any) -> list[Tensor]:
            tensors = [x for x in inputs if isinstance(x, Tensor) and torch.is_tensor(x)]
            assert all(
                x.dim() == 2 and x.size(1) == 3 and x.dtype.is_floating_point for x in tensors
            )
            return [self.b(self.a(x).relu()) for x in tensors] * options.get("times", 1)

    assert analyze(Many(), (torch.randn(5, 3), "skipped", torch.randn(2, 3))).num_scales == 4


def test_shapes_may_steer_python() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        n, c = x.shape
        y = m.a(x) if len(x) > 3 else -m.a(x)
        for _ in range(int(n) // 2):
            y = y.relu()
        return m.b(y.view(n, 2, -1).reshape(n, c + 1))

    assert sound(two_layers(run)) == 4


# --- both front ends ---------------------------------------------------------------------------

BOTH = [s for s in ZOO if s.name in {
    "conv, pool, flatten, linear", "grouped conv", "channel shuffle", "batch norm", "dense block",
    "u-net", "squeeze and excitation", "gated by relu", "division by abs", "index buffer",
    "transposed inside", "shared layer", "einsum", "attention with two heads", "layer norm",
    "embedding", "channels padded by zeros", "y over its norm", "bilinear", "prelu",
    "weights stacked", "pointnet", "reflected borders", "transposed grouped conv",
}]  # fmt: skip


@pytest.mark.parametrize("small", BOTH, ids=lambda small: small.name)
def test_both_front_ends_give_the_same_plan(small: Small) -> None:
    model = randomized(small.build())
    plans = [
        analyze(model, small.inputs(), batchnorm="affine", tracer=tracer)
        for tracer in ("symbolic", "export")
    ]
    assert [plan.tracer for plan in plans] == ["symbolic", "export"]
    assert largest_change(plans[1], small.inputs()) < ROUNDING
    first, second = (
        sorted((g.channels, g.producers, g.consumers) for g in plan.groups) for plan in plans
    )
    assert first == second
    assert plans[0].num_scales == plans[1].num_scales


def test_the_trace_is_in_order_and_complete() -> None:
    found = trace(two_layers(plain), ROWS)
    assert [node.op for node in found.nodes if node.args] == ["linear", "relu", "linear"]
    assert all(n.index < node.index for node in found.nodes for n in node.inputs())
    assert [how for _, how in found.outputs] == ["output of the model"]
    assert {n.name for n in found.nodes if n.op == "parameter"} == {
        "a.weight", "a.bias", "b.weight", "b.bias"
    }  # fmt: skip
