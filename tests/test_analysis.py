"""What `analyze` finds on small models, against a count made by numbers alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enorm_fx import analyze
from enorm_fx.errors import ArgumentError
from enorm_fx.model_plan import Plan
from enorm_fx.symmetry.solution import ScaleTerm
from tests.support.laws import ROUNDING, clear_rank, count_symmetries, largest_change, randomized
from tests.support.zoo_small import ZOO, Net, Small, parameter


def plan_of(small: Small, **options: Any) -> tuple[Plan, tuple[Tensor, ...]]:
    model, inputs = randomized(small.build()), small.inputs()
    return analyze(model, inputs, **{"batchnorm": "affine", **options}), inputs


@pytest.mark.parametrize("small", ZOO, ids=lambda small: small.name)
def test_every_symmetry_is_found_and_none_is_invented(small: Small) -> None:
    plan, inputs = plan_of(small)
    assert plan.exact
    assert largest_change(plan, inputs) < ROUNDING
    assert plan.num_scales == count_symmetries(plan.model, inputs)


@pytest.mark.parametrize("small", ZOO, ids=lambda small: small.name)
def test_groups_and_pairs_describe_the_scales(small: Small) -> None:
    plan, _ = plan_of(small)
    names = {name for name, _ in plan.model.named_parameters()}
    assert sum(group.channels for group in plan.groups) == plan.num_scales
    assert [g.start for g in plan.groups] == [
        sum(g.channels for g in plan.groups[:k]) for k in range(len(plan.groups))
    ]
    for group in plan.groups:
        moved = moved_by(plan, range(group.start, group.start + group.channels))
        assert moved
        assert {*group.producers, *group.consumers} <= moved <= names
    for pair in plan.pairs:
        assert any(
            pair.producer in g.producers and pair.consumer in g.consumers for g in plan.groups
        )


def moved_by(plan: Plan, scales: range) -> set[str]:
    """Parameters that some of the scales move."""
    return {
        p.name
        for p in plan.parameters
        for t in p.terms
        if bool(((t.index >= scales.start) & (t.index < scales.stop)).any())
    }


@pytest.mark.parametrize("small", ZOO[:30], ids=lambda small: small.name)
def test_no_scale_is_idle_or_redundant(small: Small) -> None:
    plan, _ = plan_of(small)
    rows = []
    for entry in plan.parameters:
        matrix = torch.zeros(torch.Size(entry.shape).numel(), plan.num_scales + 1).double()
        for term in entry.terms:
            index = term.index.expand(entry.shape).reshape(-1)
            matrix[torch.arange(len(index)), index] += term.coefficient
        rows.append(matrix[:, :-1])
    exponents = torch.cat(rows)
    assert int(torch.linalg.matrix_rank(exponents)) == plan.num_scales if plan.num_scales else True
    assert exponents.shape[1] == plan.num_scales


# --- the counts by hand, and helpers that must be able to say no -------------------------------


def test_the_count_knows_models_that_can_be_counted_by_hand() -> None:
    by_name = {small.name: small for small in ZOO}
    expected = {
        "mlp": 4 + 3, "linear chain": 3, "tanh": 0, "one layer": 0, "two heads": 4,
        "gated by relu": 8, "an output that is read on": 0, "grouped conv": 4 + 4,
        "attention": 2 + 2, "shared layer": 3, "y + y * y": 0, "broadcast sum of 4 and 1": 1,
    }  # fmt: skip
    for name, count in expected.items():
        model = randomized(by_name[name].build())
        assert count_symmetries(model, by_name[name].inputs()) == count, name


def test_a_matrix_without_a_gap_has_no_clear_rank() -> None:
    left, right = (torch.linalg.qr(torch.randn(12, 12).double())[0] for _ in range(2))
    sharp = torch.tensor([1.0] * 8 + [1e-12] * 4).double()
    assert clear_rank(left @ torch.diag(sharp) @ right, 1e-6) == 8
    fading = 4.0 ** -torch.arange(12).double()
    with pytest.raises(AssertionError, match="no gap"):
        clear_rank(left @ torch.diag(fading) @ right, 1e-4)


def test_a_tampered_plan_changes_the_function() -> None:
    plan, inputs = plan_of(next(small for small in ZOO if small.name == "mlp"))
    first = plan.parameters[0]
    terms = tuple(ScaleTerm(-t.coefficient, t.index) for t in first.terms)
    wrong = replace(plan, parameters=(replace(first, terms=terms), *plan.parameters[1:]))
    assert largest_change(plan, inputs) < ROUNDING
    assert largest_change(wrong, inputs) > 1e-3


# --- options -----------------------------------------------------------------------------------


def bn_net() -> nn.Module:
    return randomized(
        nn.Sequential(
            nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.Flatten(),
            nn.Linear(18, 2),
        )
    )  # fmt: skip


IMAGES = torch.randn(2, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_looking_through_batch_norm_is_not_exact() -> None:
    plan = analyze(bn_net(), IMAGES, batchnorm="skip")
    assert not plan.exact
    assert largest_change(plan, (IMAGES,)) > 1e-3
    assert plan.groups[0].producers == ("0.weight",)
    assert plan.groups[0].consumers == ("3.weight",)
    assert plan.pairs[0].via == ("batch_norm", "relu")
    assert not any(p.terms for p in plan.parameters if p.name.startswith("1."))


def test_batch_norm_as_a_producer_is_exact_in_training_too() -> None:
    for training in (False, True):
        model = bn_net().train(training)
        plan = analyze(model, IMAGES, batchnorm="affine")
        assert plan.exact
        assert plan.groups[0].producers == ("1.weight",)
        assert largest_change(plan, (IMAGES,)) < ROUNDING


def test_a_plan_that_skips_where_no_scale_crosses_is_exact() -> None:
    model = randomized(
        nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    )
    plan = analyze(model, torch.randn(4, 3).double(), batchnorm="skip")
    assert plan.exact
    assert plan.num_scales == 4


def test_a_gamma_that_is_skipped_stays_even_where_it_is_used_again() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.c(m.bn(m.a(x)) + m.b(x) * m.bn.weight)

    model = randomized(Net(run, a=nn.Linear(3, 4), bn=nn.BatchNorm1d(4), b=nn.Linear(3, 4),
                           c=nn.Linear(4, 2)))  # fmt: skip
    plan = analyze(model, torch.randn(5, 3).double(), batchnorm="skip")
    assert not [p for p in plan.parameters if p.name == "bn.weight" and p.terms]


def test_running_statistics_that_are_parameters_stay() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.b(F.batch_norm(m.a(x), m.mean, m.var.exp(), m.g).relu())

    model = randomized(Net(run, a=nn.Linear(3, 4), mean=parameter(4), var=parameter(4),
                           g=parameter(4), b=nn.Linear(4, 2)))  # fmt: skip
    x = torch.randn(5, 3).double()
    plan = analyze(model, x, batchnorm="affine")
    assert largest_change(plan, (x,)) < ROUNDING
    assert {name for p in plan.parameters if p.terms for name in [p.name]} == {"g", "b.weight"}
    assert plan.num_scales == 4


def mlp() -> nn.Module:
    return randomized(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))


ROWS = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_biases() -> None:
    follow, stay, count = (
        analyze(mlp(), ROWS, biases=option) for option in ("rescale", "skip", "balance")
    )
    by_name = [{p.name: p for p in plan.parameters} for plan in (follow, stay, count)]
    assert by_name[0]["0.bias"].terms
    assert not by_name[0]["0.bias"].counted
    assert by_name[2]["0.bias"].counted
    assert by_name[2]["0.bias"].terms
    assert "0.bias" not in by_name[1] or not by_name[1]["0.bias"].terms
    assert (follow.exact, stay.exact, count.exact) == (True, False, True)
    assert largest_change(stay, (ROWS,)) > 1e-3
    assert largest_change(count, (ROWS,)) < ROUNDING


def test_frozen_parameters_stay_unless_told_otherwise() -> None:
    model = nn.Sequential(
        *mlp(), nn.ReLU(), nn.Linear(2, 3).double(), nn.ReLU(), nn.Linear(3, 1).double()
    )
    model[2].requires_grad_(False)
    pinned = analyze(model, ROWS)
    assert pinned.num_scales == 3
    assert not any(p.terms for p in pinned.parameters if p.name.startswith("2."))
    assert any("frozen" in b.reason for b in pinned.blocked)
    assert analyze(model, ROWS, frozen="rescale").num_scales == 4 + 2 + 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batchnorm": "fold"}, "batchnorm must be one of 'skip', 'affine', not 'fold'"),
        ({"biases": True}, "biases must be one of"),
        ({"frozen": None}, "frozen must be one of"),
        ({"tracer": "fx"}, "tracer must be one of"),
    ],
)
def test_options_that_do_not_exist(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        analyze(mlp(), ROWS, **options)


def test_a_model_must_be_a_module() -> None:
    with pytest.raises(ArgumentError, match=r"model must be a torch\.nn\.Module, not Tensor"):
        analyze(ROWS, ROWS)  # type: ignore[arg-type]


def test_depth_counts_weights_on_the_longest_path() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return m.d(y + m.c(m.b(y).relu()))

    model = randomized(Net(run, a=nn.Linear(3, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4),
                           d=nn.Linear(4, 1)))  # fmt: skip
    plan = analyze(model, ROWS)
    depth = {p.name: p.depth for p in plan.parameters if p.name.endswith("weight")}
    assert depth == {"a.weight": 1, "b.weight": 2, "c.weight": 3, "d.weight": 4}
    assert [p.name for p in plan.parameters if p.last and p.counted] == ["d.weight"]


def test_blocked_sides_say_why() -> None:
    plan = analyze(nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)), ROWS.float())
    found = {(b.weight, b.side): b.reason for b in plan.blocked}
    assert set(found) == {(w, s) for w in ("0.weight", "2.weight") for s in ("input", "output")}
    assert "sigmoid" in found["0.weight", "output"]
    assert "sigmoid" in found["2.weight", "input"]
    assert "input" in found["0.weight", "input"]
    assert "output" in found["2.weight", "output"]


def test_where_new_tensors_lie_by_default_does_not_matter() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x).relu() * torch.ones(4) + torch.zeros_like(x[:, :1]))

    with torch.device("meta"):
        plan = analyze(Net(run, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), torch.randn(2, 3))
        assert torch.get_default_device().type == "meta"
    assert plan.num_scales == 4
    assert {term.index.device.type for p in plan.parameters for term in p.terms} == {"cpu"}
