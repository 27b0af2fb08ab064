"""Fused equals the optimizer's step and then ENorm's, for every optimizer, order and backend."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import enorm_fx
from enorm_fx.enorm import ENorm
from enorm_fx.step.fused import fixed_memory
from tests.support.dags import Replay, seeded_recipe, tensors_for
from tests.support.fused_runs import (
    OPTIMIZERS,
    case_of,
    difference,
    everything,
    loss_of,
    train,
    trained,
)
from tests.support.helpers import BACKENDS, KINDS, make, outputs, same_bits, weights
from tests.support.plans import Case

ORDERS = ("sequential", "alternating", "colored")
PAIRS = list(zip(KINDS, itertools.cycle(OPTIMIZERS), itertools.cycle(ORDERS)))


def check_equal(
    pair: tuple[Case, Case], name: str, steps: int, tolerance: float, backend: str, **settings: Any
) -> None:
    one, other = pair
    optimizer, _ = trained(one, OPTIMIZERS[name], steps, fused=False, **settings)
    same, enorm = trained(other, OPTIMIZERS[name], steps, fused=True, backend=backend, **settings)
    assert enorm.backend == backend
    assert enorm.state_dict()["calls"] == steps
    found, expected = everything(other.model, same), everything(one.model, optimizer)
    names = weights(one.model)
    assert difference({n: found[n] for n in names}, {n: expected[n] for n in names}) < tolerance
    # Gradients are sums of larger numbers, so buffers have fewer digits: at the end some are
    # zero but for rounding.
    assert difference(found, expected, least=1e-2) < 100 * tolerance


def cast(case: Case, dtype: torch.dtype) -> Case:
    return Case(case.name, case.model.to(dtype), case.plan, case.inputs.to(dtype))


@pytest.mark.parametrize(("kind", "name", "order"), PAIRS)
def test_steps_are_the_same(kind: str, name: str, order: str) -> None:
    pair = make(kind, seed=3), make(kind, seed=3)
    check_equal(pair, name, 40, 1e-12, BACKENDS[-1], order=order)


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_two_hundred_steps_are_the_same(name: str) -> None:
    check_equal((make("gated"), make("gated")), name, 200, 1e-12, BACKENDS[-1])
    pair = cast(make("residual"), torch.float32), cast(make("residual"), torch.float32)
    check_equal(pair, name, 200, 1e-5, BACKENDS[-1], order="alternating")


@pytest.mark.parametrize("kind", ["grouped-4", "residual", "chain-conv"])
def test_float32_is_as_near_to_float64_as_without_fused(kind: str) -> None:
    """Rounding sets both apart from the exact weights, and from each other, by as much."""

    def found(dtype: torch.dtype, fused: bool) -> dict[str, torch.Tensor]:
        case = cast(make(kind, seed=5), dtype)
        trained(case, OPTIMIZERS["adamw"], 100, fused=fused, backend=BACKENDS[-1])
        return {name: weight.double() for name, weight in weights(case.model).items()}

    exact = found(torch.float64, False)
    plain = difference(found(torch.float32, False), exact)
    assert 1e-9 < plain < 1e-3
    assert difference(found(torch.float32, True), exact) < 2 * plain


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eager_steps_are_the_same(name: str) -> None:
    for kind, dtype, tolerance in (
        ("gated", torch.float64, 1e-12),
        ("chain-conv", torch.float32, 1e-5),
        ("residual", torch.bfloat16, 0.02),
    ):
        pair = cast(make(kind, seed=3), dtype), cast(make(kind, seed=3), dtype)
        check_equal(pair, name, 6, tolerance, "eager", cycles=2, every=2)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_them_are_the_same(
    kind: str, name: str, order: str, backend: str, dtype: torch.dtype
) -> None:
    pair = cast(make(kind, seed=5), dtype), cast(make(kind, seed=5), dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-5
    check_equal(pair, name, 200, tolerance, backend, order=order)


def test_the_comparison_notices_a_rescaling_that_is_left_out() -> None:
    one, other = make("residual", seed=3), make("residual", seed=3)
    first, _ = trained(one, OPTIMIZERS["momentum"], 3, fused=False)
    second, _ = trained(other, OPTIMIZERS["momentum"], 3, fused=True, every=3)
    found, expected = everything(other.model, second), everything(one.model, first)
    assert difference(found, expected) > 1e-6
    assert difference({}, expected) == float("inf")


SETTINGS: list[dict[str, Any]] = [
    {"p": 1, "c": 1.2},
    {"p": float("inf")},
    {"p": 3},
    {"cycles": 3},
    {"every": 3},
    {"order": "alternating", "cycles": 2},
    {"exact": True, "start": "as_is"},
    {"last_layer": False},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_setting_goes_with_it(settings: dict[str, Any], backend: str) -> None:
    for kind, name in (("residual", "momentum"), ("chain-conv", "adamw")):
        pair = make(kind, seed=3), make(kind, seed=3)
        check_equal(pair, name, 7, 1e-11, backend, **settings)


# ---- random graphs ----


def check_random_graph(seed: int, name: str, backend: str) -> bool:
    """False: nothing in it can be trained and moved."""
    recipe = seeded_recipe(seed)
    inputs = tuple(x.clone() for x in tensors_for(recipe))
    pair = []
    for _ in range(2):
        model = Replay(recipe)
        plan = enorm_fx.analyze(model, tuple(x.clone() for x in inputs), batchnorm="affine")
        if not plan.groups or not all(p.isfinite().all() for p in model.parameters()):
            return False
        pair.append(case_of(model, plan, inputs))
        loss = loss_of(copy.deepcopy(model), tuple(x.clone() for x in inputs))
        if not loss.requires_grad or not bool(loss.isfinite()):
            return False
        trial = copy.deepcopy(model)
        try:
            loss_of(trial, tuple(x.clone() for x in inputs)).backward()
        except RuntimeError as error:  # it writes into what has been read
            if "modified by an inplace operation" not in str(error):
                raise
            return False
        gradients = [p.grad for p in trial.parameters() if p.grad is not None]
        if not gradients or not all(bool(g.isfinite().all()) for g in gradients):
            return False
    check_equal((pair[0], pair[1]), name, 8, 1e-9, backend)
    return True


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_graphs(backend: str) -> None:
    names = itertools.cycle(OPTIMIZERS)
    done = [check_random_graph(seed, next(names), backend) for seed in range(9)]
    assert sum(done) >= 3


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(300))
def test_many_random_graphs(seed: int) -> None:
    for name, backend in itertools.product(OPTIMIZERS, BACKENDS):
        check_random_graph(seed, name, backend)


# ---- large enough for threads; memory in other orders ----


@pytest.mark.parametrize(
    ("order", "dtype", "tolerance", "channels_last"),
    [
        ("sequential", torch.float64, 1e-11, True),
        ("alternating", torch.float64, 1e-11, False),
        ("alternating", torch.float32, 1e-4, True),
        ("sequential", torch.float32, 1e-4, False),
    ],
)
def test_threads_and_memory_orders_do_not_matter(
    order: str, dtype: torch.dtype, tolerance: float, channels_last: bool
) -> None:
    def made() -> Case:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 130, 3), nn.ReLU(),
            nn.Conv2d(130, 64, 1, groups=2), nn.MaxPool2d(2), nn.Flatten(), nn.ReLU(),
            nn.Linear(64 * 9, 300), nn.ReLU(), nn.Linear(300, 203), nn.ReLU(), nn.Linear(203, 5),
        ).to(dtype)  # fmt: skip
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        x = torch.randn(2, 3, 10, 10, dtype=dtype)
        return case_of(model, enorm_fx.analyze(model, x), x)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for name in ("nesterov", "amsgrad"):
            check_equal((made(), made()), name, 4, tolerance, BACKENDS[-1], order=order)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("p", [1, 2, float("inf")])
def test_rows_that_are_summed_in_several_pieces(p: float) -> None:
    def made() -> Case:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(1100, 70), nn.ReLU(), nn.Linear(70, 1030), nn.ReLU(), nn.Linear(1030, 5)
        ).double()
        x = torch.randn(3, 1100, dtype=torch.float64)
        return case_of(model, enorm_fx.analyze(model, x), x)

    pair = made(), made()

    def before(number: int) -> None:
        if number == 2:  # the optimizer passes over this weight, and its rows are rescaled
            for case in pair:
                case.model.get_parameter("0.weight").grad = None

    check_equal(pair, "momentum", 4, 1e-11, BACKENDS[-1], p=p, before=before)


# ---- what is stored is one network ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_function_between_steps_is_that_of_the_other_run(backend: str) -> None:
    one, other = make("gated", seed=3), make("gated", seed=3)
    first, second = (OPTIMIZERS["amsgrad"](case.model.parameters()) for case in (one, other))
    enorm = ENorm(one.plan, first, last_layer=True)
    ENorm(other.plan, second, last_layer=True, fused=True, backend=backend)
    for _ in range(5):
        train(one, first, enorm, 1)
        train(other, second, None, 1)
        scale = outputs(one).abs().max()
        assert float((outputs(other) - outputs(one)).abs().max() / scale) < 1e-12
    assert difference(weights(other.model), weights(one.model)) > 1e-6  # a rescaling is pending


@pytest.mark.parametrize("order", ["sequential", "alternating"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_goes_on_to_the_last_bit(backend: str, order: str) -> None:
    def made() -> tuple[Case, Optimizer, ENorm]:
        case = make("residual", seed=5)
        optimizer = AdamW(case.model.parameters(), lr=1e-3)
        return (
            case,
            optimizer,
            ENorm(case.plan, optimizer, fused=True, order=order, every=2, backend=backend),
        )

    for steps in (1, 2, 5):
        case, optimizer, enorm = made()
        train(case, optimizer, None, steps)
        assert enorm.state_dict()["pending"] == (steps == 2)
        other, second, resumed = made()
        other.model.load_state_dict(case.model.state_dict())
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        resumed.load_state_dict(enorm.state_dict())
        train(case, optimizer, None, 4)
        train(other, second, None, 4)
        assert same_bits(everything(other.model, second), everything(case.model, optimizer))
        assert resumed.state_dict() == enorm.state_dict()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_are_written_between_steps_are_measured_anew(backend: str) -> None:
    found = []
    for flush in (False, True):
        case = make("residual", seed=3)
        optimizer, enorm = trained(
            case, OPTIMIZERS["momentum"], 3, fused=True, backend=backend, start="as_is"
        )
        train(case, optimizer, None, 1)
        with torch.no_grad():
            case.model.get_parameter("down0.weight").mul_(3.0)
        if flush:
            enorm.flush_()
            assert not enorm.state_dict()["pending"]
        train(case, optimizer, None, 1)
        enorm.flush_()
        found.append(everything(case.model, optimizer))
    assert difference(found[0], found[1]) < 1e-12


@pytest.mark.skipif("native" not in BACKENDS, reason="no compiler")
def test_parameters_that_count_their_writes_together_are_not_measured_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Views of one tensor do."""
    case = make("residual", seed=3)
    for layer in (case.model.get_submodule("down0"), case.model.get_submodule("up0")):
        flat = torch.cat([p.detach().reshape(-1) for p in layer.parameters()])
        parts = flat.split([p.numel() for p in layer.parameters()])
        for (name, p), part in zip(list(layer.named_parameters()), parts, strict=True):
            setattr(layer, name, nn.Parameter(part.view_as(p)))
    plan = enorm_fx.analyze(case.model, case.inputs)
    case = Case(case.name, case.model, plan, case.inputs)
    optimizer = OPTIMIZERS["momentum"](case.model.parameters())
    enorm = ENorm(plan, optimizer, fused=True, backend="native")
    train(case, optimizer, None, 3)
    assert enorm.backend == "native"
    measured = []
    check_held = fixed_memory.check_held
    monkeypatch.setattr(
        fixed_memory, "check_held", lambda *given: measured.append(given) or check_held(*given)
    )
    train(case, optimizer, None, 3)
    assert not measured


def test_an_unfused_run_takes_up_the_state_of_a_fused_one_and_the_other_way_round() -> None:
    case = make("residual", seed=3)
    optimizer, enorm = trained(case, OPTIMIZERS["adam"], 3, fused=True)
    train(case, optimizer, None, 1)
    state = enorm.state_dict()
    enorm.detach()
    plain = ENorm(case.plan, optimizer)
    plain.load_state_dict(state)
    assert "pending" not in plain.state_dict()
    again = ENorm(case.plan, optimizer, fused=True)
    again.load_state_dict(plain.state_dict())
    assert again.state_dict() == {**plain.state_dict(), "pending": False}


# ---- parts of models ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_gradients_that_are_none_and_parameters_that_nobody_steps(backend: str) -> None:
    def run(fused: bool) -> dict[str, torch.Tensor]:
        case = make("residual", seed=3)
        model = case.model
        named = dict(model.named_parameters())
        left_out = named.pop("up0.weight")
        first = {"params": [named.pop("embed.weight"), named.pop("head.bias")], "lr": 1e-2}
        second = {"params": list(named.values()), "weight_decay": 1e-2, "momentum": 0.5}
        optimizer = SGD([first, second], lr=1e-3, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        enorm = ENorm(case.plan, optimizer, last_layer=True, fused=fused, backend=backend)

        def before(number: int) -> None:
            model.get_parameter("down1.weight").grad = (
                None if number < 3 else (model.get_parameter("down1.weight").grad)
            )
            if number == 5:
                model.get_parameter("up1.bias").grad = None
            if number > 0:
                scheduler.step()

        train(case, optimizer, None if fused else enorm, 8, before)
        enorm.flush_()
        assert left_out not in optimizer.state
        assert enorm.backend == backend
        return everything(model, optimizer)

    assert difference(run(True), run(False)) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_settings_that_change_between_steps(backend: str) -> None:
    def run(fused: bool) -> dict[str, torch.Tensor]:
        case = make("residual", seed=3)

        def before(number: int) -> None:
            group = optimizer.param_groups[0]
            group["lr"], group["momentum"] = 1e-3 / (1 + number), (0.9, 0.5, 0.0)[number // 3]

        optimizer = SGD(case.model.parameters(), lr=1e-3, momentum=0.9)
        enorm = ENorm(case.plan, optimizer, last_layer=True, fused=fused, backend=backend)
        train(case, optimizer, None if fused else enorm, 9, before)
        enorm.flush_()
        return everything(case.model, optimizer)

    # With momentum 0 buffers stay as they are, and torch operations take over.
    found = run(True) if backend == "eager" else _warned(run)
    assert difference(found, run(False)) < 1e-12


def _warned(run: Any) -> dict[str, torch.Tensor]:
    from enorm_fx.step import backends

    backends._warned.clear()
    with pytest.warns(RuntimeWarning, match="the state of 'embed.weight' is not that of"):
        result: dict[str, torch.Tensor] = run(True)
    backends._warned.clear()
    return result
