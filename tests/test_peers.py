"""Models on which other tools change the function without a word: each is right or refused here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enorm_fx import analyze
from tests.support.laws import ROUNDING, count_symmetries, largest_change, randomized
from tests.support.zoo_small import Net

L, C = nn.Linear, nn.Conv2d


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def exact_scales(model: nn.Module, *inputs: Tensor) -> int:
    """How many scales the plan has; it must keep the function and miss nothing."""
    model = randomized(model)
    plan = analyze(model, inputs, batchnorm="affine")
    assert plan.exact
    assert largest_change(plan, inputs) < ROUNDING
    assert plan.num_scales == count_symmetries(model, inputs)
    return plan.num_scales


ROWS, IMAGES = numbers(5, 3), numbers(4, 2, 5, 5)


def test_a_module_that_is_called_twice() -> None:
    model = Net(lambda m, x: m.b(m.a(m.a(x).relu()).relu()), a=L(3, 3), b=L(3, 2))
    assert (
        exact_scales(model, ROWS) == 0
    )  # its input side is the model's input, its output meets it
    inner = Net(lambda m, x: m.c(m.b(m.b(m.a(x)).relu())), a=L(3, 3), b=L(3, 3), c=L(3, 2))
    assert exact_scales(inner, numbers(9, 3)) == 3


def test_a_consumer_that_also_reads_the_input() -> None:
    model = Net(lambda m, x: m.b(m.a(x).relu()) + m.b(x), a=L(3, 3), b=L(3, 2))
    assert exact_scales(model, ROWS) == 0


def test_a_weight_that_is_read_by_a_function_as_well() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x).relu()) + F.linear(x, m.a.weight).sum(1, keepdim=True)

    assert exact_scales(Net(run, a=L(3, 4), b=L(4, 2)), ROWS) == 0


@pytest.mark.parametrize(
    ("product", "count"),
    [
        (lambda y, z, w: y * y, 4),
        (lambda y, z, w: y * y.relu(), 4),
        (lambda y, z, w: y + z * w, 8),
        (lambda y, z, w: y + y * y, 0),
        (lambda y, z, w: y * 3 + z / 2 + w, 4),
    ],
    ids=["y*y", "y*relu(y)", "a+b*c", "y+y*y", "numbers"],
)
def test_products_are_not_free_of_scale(product: Callable[..., Tensor], count: int) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.d(product(m.a(x), m.b(x), m.c(x)))

    model = Net(run, a=L(3, 4), b=L(3, 4), c=L(3, 4), d=L(4, 2))
    assert exact_scales(model, numbers(8, 3)) == count


def test_a_constant_that_is_added() -> None:
    model = Net(lambda m, x: m.b(m.a(x).relu() + 1.0), a=L(3, 4), b=L(4, 2))
    assert exact_scales(model, ROWS) == 0


def test_eight_channels_and_one() -> None:
    model = Net(
        lambda m, x: m.c((m.a(x) + m.b(x)).relu()), a=C(2, 8, 1), b=C(2, 1, 1), c=C(8, 1, 1)
    )
    assert exact_scales(model, IMAGES) == 1


def test_an_index_that_permutes_channels() -> None:
    order = torch.tensor([3, 1, 0, 2])
    model = Net(
        lambda m, x: m.b(m.a(x).relu()[:, m.order]), a=C(2, 4, 1), b=C(4, 1, 1), order=order
    )
    assert exact_scales(model, IMAGES) == 4


def test_flatten_to_the_wrong_axis() -> None:
    model = nn.Sequential(C(2, 3, 1), nn.ReLU(), nn.Flatten(2), L(25, 2))
    assert exact_scales(model, IMAGES) == 1  # one scale for all, as positions mix


def test_linear_over_the_width() -> None:
    assert exact_scales(nn.Sequential(C(2, 3, 1), nn.ReLU(), L(5, 2)), IMAGES) == 1
    model = nn.Sequential(C(2, 3, 1), nn.ReLU(), L(5, 2), nn.ReLU(), L(2, 2))
    assert exact_scales(model, IMAGES) == 1 + 2


def test_cat_along_another_axis() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.c(torch.cat([m.a(x).relu(), m.b(x).relu()], dim=2))

    assert exact_scales(Net(run, a=C(2, 3, 1), b=C(2, 3, 1), c=C(3, 1, 1)), IMAGES) == 3


@pytest.mark.parametrize(("hook", "count"), [(lambda y: y + 1.0, 0), (lambda y: 2 * y, 4)])
def test_a_forward_hook_that_changes_an_output(hook: Callable[..., Tensor], count: int) -> None:
    model = nn.Sequential(L(3, 4), nn.ReLU(), L(4, 2))
    model[0].register_forward_hook(lambda module, args, output: hook(output))
    assert exact_scales(model, ROWS) == count


def test_a_forward_pre_hook_that_changes_an_input() -> None:
    model = nn.Sequential(L(3, 4), nn.ReLU(), L(4, 2))
    model[2].register_forward_pre_hook(lambda module, args: (args[0].sigmoid(),))
    assert exact_scales(model, ROWS) == 0


def test_parameters_stay_the_objects_that_an_optimizer_and_a_tie_hold() -> None:
    model = nn.Sequential(L(3, 4), nn.ReLU(), L(4, 4), nn.ReLU(), L(4, 4), nn.ReLU(), L(4, 1))
    model[4].weight = model[2].weight
    before = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = analyze(model, ROWS.float())
    plan.rescale_(torch.randn(plan.num_scales, generator=torch.Generator().manual_seed(0)))
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert model[4].weight is model[2].weight
    held = optimizer.param_groups[0]["params"]
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))


def test_an_intermediate_result_that_is_an_output_too() -> None:
    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.a(x)
        return m.b(y.relu()), y

    assert exact_scales(Net(run, a=L(3, 4), b=L(4, 2)), ROWS) == 0


def test_a_reused_convolution() -> None:
    model = Net(lambda m, x: m.c(m.b(m.b(m.a(x).relu()).relu())), a=C(2, 3, 1), b=C(3, 3, 1),
                c=C(3, 1, 1))  # fmt: skip
    assert exact_scales(model, numbers(6, 2, 3, 3)) == 3


def test_tied_convolutions() -> None:
    a, b, c, d = C(2, 2, 1), C(2, 2, 1), C(2, 2, 1), C(2, 1, 1)
    c.weight = b.weight
    model = Net(lambda m, x: m.d(m.c(m.b(m.a(x).relu()).relu()).relu()), a=a, b=b, c=c, d=d)
    assert exact_scales(model, numbers(6, 2, 3, 3)) == 3  # two, and one from weight to weight


def test_a_bias_and_padding() -> None:
    model = nn.Sequential(C(2, 3, 3, padding=1), nn.ReLU(), C(3, 2, 3, padding=1), nn.ReLU(),
                          C(2, 1, 1))  # fmt: skip
    assert exact_scales(model, numbers(3, 2, 4, 4)) == 5


def test_padding_by_a_number() -> None:
    model = nn.Sequential(C(2, 3, 1), nn.ConstantPad2d(1, 0.5), C(3, 1, 1))
    assert exact_scales(model, IMAGES) == 0


def test_a_row_of_zeros_stays_finite() -> None:
    model = randomized(nn.Sequential(L(3, 4), nn.ReLU(), L(4, 2)))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight[:, 2] = 0
    plan = analyze(model, ROWS)
    assert plan.num_scales == 4
    assert largest_change(plan, (ROWS,)) < ROUNDING


def test_gelu_is_checked() -> None:
    assert exact_scales(nn.Sequential(L(3, 4), nn.GELU(), L(4, 2)), ROWS) == 0


def test_layers_registered_in_another_order_than_they_run() -> None:
    model = Net(lambda m, x: m.a(m.b(m.c(x).relu()).relu()), a=L(5, 2), b=L(4, 5), c=L(3, 4))
    plan = analyze(randomized(model), ROWS)
    assert [(p.producer, p.consumer, p.channels) for p in plan.pairs] == [
        ("c.weight", "b.weight", 4), ("b.weight", "a.weight", 5)
    ]  # fmt: skip
    assert largest_change(plan, (ROWS,)) < ROUNDING


def test_names_mean_nothing() -> None:
    model = Net(lambda m, x: F.linear(F.linear(x, m.bn_kernel).relu(), m.running_mean),
                bn_kernel=nn.Parameter(torch.randn(4, 3)),
                running_mean=nn.Parameter(torch.randn(2, 4)))  # fmt: skip
    assert exact_scales(model, ROWS) == 4


def test_biases_follow_their_layer() -> None:
    model = randomized(nn.Sequential(L(3, 4), nn.ReLU(), L(4, 2)))
    plan = analyze(model, ROWS)
    moved = {p.name for p in plan.parameters if p.terms}
    assert moved == {"0.weight", "0.bias", "2.weight"}
