"""Laws of the generated step: it does what the careful one does, or changes no bit."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from enorm_fx import analyze
from enorm_fx.model_plan import Plan
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.generated.generate import Eager, generate
from enorm_fx.step.generated.tuning import Tuning
from enorm_fx.step.native.backend import make_native
from enorm_fx.step.native.compiler import find_compiler
from tests.support import slow_reference as slow
from tests.support.dags import Replay, seeded_recipe, tensors_for
from tests.support.helpers import (
    KINDS,
    ORDERS,
    copied,
    largest_error,
    make,
    restore_,
    same_bits,
    tensors_of,
    trained,
    weights,
)
from tests.support.plans import Case, Labels, Net, chain, fill_, grouped, make_plan

POWERS = (1.0, 2.0, 3.5, math.inf)
# What a CUDA device gets, and sizes at which every tensor is cut into pieces, or half of them.
TUNINGS = (Tuning(1 << 62, 1 << 62), Tuning(0, 40), Tuning(20, 64))
NATIVE = Tuning(-1, -1)  # not a tuning: the other backend, under the same laws
BAD = (math.nan, math.inf, -math.inf)


def program_of(plan: Plan, **settings: Any) -> CarefulStep:
    return CarefulStep(plan, plan.groups, **{"p": 2.0, **settings})


def _given(optimizer: Optimizer | None) -> tuple[Optimizer, ...]:
    return () if optimizer is None else (optimizer,)


def generated(
    program: CarefulStep,
    optimizer: Optimizer | None = None,
    cycles: int = 1,
    tuning: Tuning | None = None,
) -> Any:
    program.bind_()
    recipe = program.recipe(program.collect(_given(optimizer), None, gradients=False), cycles)
    if tuning is NATIVE:
        return make_native(recipe) if find_compiler() else generate(recipe)
    return generate(recipe, tuning)


def check(
    model: nn.Module,
    plan: Plan,
    optimizer: Optimizer | None = None,
    *,
    cycles: int = 1,
    error: float = 1e-12,
    tunings: tuple[Tuning | None, ...] = (None, *TUNINGS, NATIVE),
    **settings: Any,
) -> None:
    """The generated step is the careful one, in pieces of all sizes; the second run like the
    first."""
    program = program_of(plan, **settings)
    tensors = tensors_of(model, optimizer)
    old = copied(tensors)
    program.run_(_given(optimizer), None, cycles)
    expected = copied(tensors)
    assert settings.get("exact") or not same_bits(expected, old)
    for tuning in tunings:
        restore_(tensors, old)
        step = generated(program, optimizer, cycles, tuning)
        for _ in range(2):
            restore_(tensors, old)
            assert bool(step.run())
            assert largest_error(tensors, expected) < error


def adam(case: Case) -> Adam:
    optimizer = Adam(case.model.parameters(), lr=1e-6, amsgrad=True)
    for _ in range(3):
        optimizer.zero_grad()
        case.model(case.inputs).square().mean().backward()
        optimizer.step()
    return optimizer


# ---- the same as the definition, and as the careful engine ----


@pytest.mark.parametrize(
    ("p", "order"),
    [(p, order) for p in (2.0, math.inf) for order in ORDERS]
    + [(1.0, "colored"), (3.5, "simultaneous")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_what_the_definition_says(kind: str, p: float, order: str) -> None:
    c = 1.0 if p == 3.5 else 1.2
    case = make(kind, seed=4)
    expected = slow.apply(case.plan, slow.descend(case.plan, p, c, order, 1))
    tensors, old = tensors_of(case.model), weights(case.model)
    program = program_of(case.plan, p=p, c=c, order=order)
    for tuning in (None, TUNINGS[ORDERS.index(order)], NATIVE):
        restore_(tensors, old)
        assert bool(generated(program, tuning=tuning).run())
        assert largest_error(tensors, expected) < 1e-12


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("kind", KINDS)
def test_three_cycles_are_those_of_the_careful_engine(kind: str, p: float) -> None:
    number = (KINDS.index(kind) + POWERS.index(p)) % 3
    c, order = (1.0, 1.3, 0.8)[number], ORDERS[number]
    for exact, tunings in ((False, (None, TUNINGS[1], NATIVE)), (True, (*TUNINGS[::2], NATIVE))):
        case = make(kind, seed=number)
        check(case.model, case.plan, p=p, c=c, order=order, exact=exact, cycles=3, tunings=tunings)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_single_precision(kind: str, order: str) -> None:
    case = make(kind, seed=7)
    case.model.float()
    expected = slow.apply(case.plan, slow.descend(case.plan, 2, 1.2, order, 1))
    tensors, old = tensors_of(case.model), weights(case.model)
    for tuning in (NATIVE, None, TUNINGS[ORDERS.index(order)]):
        restore_(tensors, old)
        step = generated(program_of(case.plan, c=1.2, order=order), tuning=tuning)
        assert bool(step.run())
        if tuning is not NATIVE:
            floats = {w.dtype for w in step.arguments if w.dtype.is_floating_point}
            assert floats == {torch.float32}
        assert largest_error(tensors, expected) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_follow(kind: str) -> None:
    p = POWERS[KINDS.index(kind) % 4]
    case = make(kind, seed=1)
    check(case.model, case.plan, trained(case), order="colored")
    check(case.model, case.plan, adam(case))
    case = make(kind, seed=2)
    check(case.model, case.plan, adam(case), p=p, exact=True)


@pytest.mark.parametrize("seed", range(30))
def test_random_graphs(seed: int) -> None:
    model = Replay(recipe := seeded_recipe(seed))
    biases = ("rescale", "balance", "skip")[seed % 3]
    inputs = tuple(x.clone() for x in tensors_for(recipe))
    plan = analyze(model, inputs, batchnorm=("affine", "skip")[seed % 2], biases=biases)
    optimizer = SGD(model.parameters(), lr=1e-6, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    settings = {"order": ORDERS[seed % 3], "p": POWERS[seed % 4], "c": (1.0, 1.2)[seed % 2]}
    movable = [group for group in plan.groups if group.producers and group.consumers]
    if movable:
        check(model, plan, optimizer, cycles=1 + seed % 2, **settings)
    else:
        old = weights(model)
        assert bool(generated(program_of(plan, **settings), optimizer).run())
        assert same_bits(weights(model), old)


def test_a_step_is_repeated_over_the_same_memory() -> None:
    case, other = make("residual", seed=5), make("residual", seed=5)
    step = generated(program_of(case.plan), trained(case))
    optimizer, program = trained(other), program_of(other.plan)
    for _ in range(6):
        assert bool(step.run())
        program.run_((optimizer,), None, 1)
    assert largest_error(tensors_of(case.model), tensors_of(other.model)) < 1e-12


# ---- layers and memory ----


def transposed(seed: int = 0) -> Case:
    """A transposed convolution: inputs come first in its weight."""

    def run(net: Net, x: Tensor) -> Tensor:
        return net.last(torch.relu(net.middle(torch.relu(net.first(x)))))

    model = Net(
        run,
        first=nn.Conv2d(2, 4, 3),
        middle=nn.ConvTranspose2d(4, 6, 3),
        last=nn.Conv2d(6, 3, 1),
    )
    fill_(model, seed)
    inputs = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    plan = analyze(model, inputs)
    assert plan.num_scales == 10
    return Case("transposed", model, plan, inputs)


def tied(seed: int = 0) -> Case:
    """One weight under two names, with the same group on both of its sides."""

    def run(net: Net, x: Tensor) -> Tensor:
        return net.last(torch.relu(net.again(torch.relu(net.middle(torch.relu(net.first(x)))))))

    layers = {"first": nn.Linear(3, 5), "middle": nn.Linear(5, 5), "again": nn.Linear(5, 5)}
    model = Net(run, **layers, last=nn.Linear(5, 2))
    model.get_submodule("again").weight = model.get_submodule("middle").weight
    fill_(model, seed)
    inputs = torch.randn(4, 3, dtype=torch.float64)
    return Case("tied", model, analyze(model, inputs), inputs)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("build", [transposed, tied, grouped, lambda: grouped(4)])
def test_other_layers(build: Any, order: str) -> None:
    for p in (2.0, (1.0, 3.5, math.inf)[ORDERS.index(order)]):
        case = build()
        check(case.model, case.plan, trained(case), p=p, order=order)


@pytest.mark.parametrize("kernels", [(3,), (3, 1), (2,)])
def test_channels_last(kernels: tuple[int, ...]) -> None:
    for p in POWERS:
        case = chain([3, 5, 4, 6, 2], seed=2, kind="conv", kernels=kernels)
        case.model.to(memory_format=torch.channels_last)
        assert not case.model.get_parameter("layer_00.weight").is_contiguous()
        check(case.model, case.plan, trained(case), p=p)


@pytest.mark.parametrize("kind", ["chain-linear", "chain-conv", "residual", "linear-residual"])
def test_memory_in_any_order_or_with_gaps(kind: str) -> None:
    for spread in (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), with_gaps):
        for p in (2.0, math.inf):
            case = make(kind, seed=3)
            for parameter in case.model.parameters():
                if parameter.dim() > 1:
                    parameter.data = spread(parameter.data)
            tunings = (None, *TUNINGS, *(() if spread is with_gaps else (NATIVE,)))
            check(case.model, case.plan, trained(case), p=p, tunings=tunings)


def with_gaps(tensor: Tensor) -> Tensor:
    """The same numbers in every third place of some memory."""
    room = torch.zeros(*tensor.shape, 3, dtype=tensor.dtype)
    view = room[..., 1]
    return view.copy_(tensor)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_may_differ(kind: str, order: str) -> None:
    case = make(kind, seed=3)
    for number, parameter in enumerate(case.model.parameters()):
        parameter.data = parameter.data.float() if number % 4 < 2 else parameter.data
    tunings = None, TUNINGS[ORDERS.index(order)], NATIVE
    check(case.model, case.plan, order=order, c=1.1, cycles=2, error=1e-6, tunings=tunings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_rounded_once(kind: str, dtype: torch.dtype) -> None:
    case = make(kind, seed=8)
    # float16 ends at 65,504: factors of one step must be moderate.
    program_of(case.plan).run_((), None, 3)
    first = next(case.model.parameters())
    first.data *= 3
    case.model.to(dtype)
    expected = slow.apply(case.plan, slow.descend(case.plan, 2, 1.0, "sequential", 1))
    tensors, old = tensors_of(case.model), weights(case.model)
    one_rounding = torch.finfo(dtype).eps / 2 * 1.001
    for tuning in (None, *TUNINGS, NATIVE):
        restore_(tensors, old)
        assert bool(generated(program_of(case.plan), tuning=tuning).run())
        assert largest_error(tensors, expected) < one_rounding


def test_a_wide_range_of_depths_is_no_reason_to_refuse() -> None:
    case = chain([3, *[4] * 12, 2], seed=1)
    case.model.float()
    check(case.model, case.plan, c=8.0, error=1e-6)


# ---- what is refused changes no bit ----


def places(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """The first and the last entry of every parameter."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    first = [(name, (0,) * len(shape)) for name, shape in shapes.items()]
    return first + [(name, tuple(n - 1 for n in shape)) for name, shape in shapes.items()]


@pytest.mark.parametrize("p", [2.0, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_not_finite_change_nothing(kind: str, p: float) -> None:
    case = make(kind, seed=3)
    optimizer = trained(case)
    moved = {s.name for s in case.plan.parameters if s.terms}
    tensors = tensors_of(case.model, optimizer)
    steps = [
        generated(program_of(case.plan, p=p, order=order), optimizer, cycles, tuning)
        for order, cycles, tuning in zip(ORDERS, (1, 2, 1), (None, *TUNINGS[1:]), strict=True)
    ] + [
        generated(program_of(case.plan, p=p, order=order), optimizer, cycles, NATIVE)
        for order, cycles in zip(ORDERS, (1, 2, 4), strict=True)
    ]
    healthy = copied(tensors)
    for number, (name, place) in enumerate(places(case.model)):
        if name in moved:
            tensors[name][place] = BAD[number % 3]
            old = copied(tensors)
            for step in steps:
                assert not bool(step.run())
                assert same_bits(tensors, old)
            tensors[name][place] = healthy[name][place]
    assert all(bool(step.run()) for step in steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize(
    "name", ["layer_00.weight", "layer_01.weight", "layer_03.weight", "layer_01.bias"]
)
def test_what_is_too_large_is_refused(name: str, p: float, dtype: torch.dtype) -> None:
    case = make("chain-linear", seed=3)
    case.model.to(dtype)
    tensors = tensors_of(case.model)
    tensors[name].view(-1)[1] = torch.finfo(dtype).max / 2
    old = copied(tensors)
    for cycles in (1, 3):
        for tuning in (None, NATIVE):
            assert not bool(generated(program_of(case.plan, p=p), None, cycles, tuning).run())
            assert same_bits(tensors, old)


def test_factors_that_go_too_far_are_refused() -> None:
    for size in (1e14, 1e-14):
        case = make("chain-linear", seed=3)
        case.model.float()
        tensors = tensors_of(case.model)
        tensors["layer_01.weight"].mul_(size)
        tensors["layer_02.weight"].div_(size)
        old = copied(tensors)
        assert not bool(generated(program_of(case.plan)).run())
        assert same_bits(tensors, old)
        assert bool(generated(program_of(case.plan, p=1.0)).run()) is False
        assert same_bits(tensors, old)


def test_a_power_of_a_factor_counts() -> None:
    """What a weight and its momentum can take is too much for a square."""
    case = make("chain-linear", seed=3)
    momentum, squares = trained(case), adam(case)
    case.model.float()
    tensors = tensors_of(case.model)
    tensors["layer_01.weight"].mul_(1e8)
    old = copied(tensors)
    assert not bool(generated(program_of(case.plan), squares).run())
    assert same_bits(tensors, old)
    assert bool(generated(program_of(case.plan), momentum).run())


def test_a_cycle_out_of_range_is_not_forgotten_by_the_next() -> None:
    """Logs of sizes 0, 32, 0: the log scales are 16 and -8 after one cycle, 12 and -10 after two.
    Where two factors meet, 88.7 / 6 = 14.8 is the most."""
    case = chain([3, 8, 8, 2], seed=3)
    case.model.float()
    for name, weight in tensors_of(case.model).items():
        weight.fill_(math.exp(32.0 * (name == "layer_01.weight")) / weight[0].numel() ** 0.5)
    step = generated(program_of(case.plan), cycles=2)
    old = copied(tensors_of(case.model))
    assert not bool(step.run())
    assert same_bits(tensors_of(case.model), old)
    tensors_of(case.model)["layer_01.weight"].mul_(math.exp(-8.0))  # 12 after one cycle
    assert bool(step.run())


def test_columns_that_nothing_moves_are_checked() -> None:
    """head([left, x, right]): x is pinned, no scale is on the other side of the head."""
    model = Net(
        lambda net, x: net.head(torch.cat([net.left(x).relu(), x, net.right(x).relu()], 1)),
        left=nn.Linear(3, 4),
        right=nn.Linear(3, 2),
        head=nn.Linear(9, 2),
    )
    fill_(model, 1)
    plan = analyze(model, torch.randn(2, 3, dtype=torch.float64))
    assert plan.num_scales == 6
    check(model, plan)
    tensors = tensors_of(model)
    for tuning in (None, *TUNINGS, NATIVE):
        step = generated(program_of(plan), tuning=tuning)
        for column in range(9):
            old = copied(tensors)
            assert bool(step.run())
            restore_(tensors, old)
            tensors["head.weight"][1, column] = math.nan
            before = copied(tensors)
            assert not bool(step.run())
            assert same_bits(tensors, before)
            restore_(tensors, old)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("value", [0.0, 1e-310])
@pytest.mark.parametrize("side", ["incoming", "outgoing", "both"])
def test_a_dead_unit_keeps_its_scale(side: str, value: float, p: float) -> None:
    for order, tuning in [(order, tuning) for order in ORDERS for tuning in (None, NATIVE)]:
        case = make("chain-linear", seed=2)
        tensors = tensors_of(case.model)
        if side != "outgoing":
            tensors["layer_00.weight"][2] = value
        if side != "incoming":
            tensors["layer_01.weight"][:, 2] = value
        old = copied(tensors)
        assert bool(generated(program_of(case.plan, p=p, order=order), None, 3, tuning).run())
        ratio = (tensors["layer_00.bias"] / old["layer_00.bias"]).log()
        assert float(ratio[2]) == 0
        assert float(ratio[[0, 1, 3, 4, 5, 6, 7]].abs().min()) > 1e-6
        assert all(bool(w.isfinite().all()) for w in tensors.values())


def test_weights_of_zero_are_fine() -> None:
    for kind in KINDS:
        case = make(kind)
        old = copied(tensors_of(case.model))
        for tensor in tensors_of(case.model).values():
            tensor.zero_()
        zeros = copied(tensors_of(case.model))
        for tuning in (None, NATIVE):
            assert bool(generated(program_of(case.plan), None, 2, tuning).run())
            assert same_bits(tensors_of(case.model), zeros)
        assert not same_bits(zeros, old)


def test_a_group_with_one_side_only_keeps_its_scale_and_is_checked() -> None:
    case = make("flattened")
    parameters = tuple(
        replace(s, counted=s.counted and "head" not in s.name) for s in case.plan.parameters
    )
    plan = copy.copy(case.plan)
    object.__setattr__(plan, "parameters", parameters)
    tensors = tensors_of(case.model)
    steps = [generated(program_of(plan), tuning=tuning) for tuning in (None, NATIVE)]
    for name in ("features.weight", "features.bias", "head.weight"):
        old = copied(tensors)
        assert all(bool(step.run()) for step in steps)
        assert same_bits(tensors, old)
        value = float(tensors[name].view(-1)[-1])
        tensors[name].view(-1)[-1] = math.nan
        assert not any(bool(step.run()) for step in steps)
        tensors[name].view(-1)[-1] = value


def test_a_plan_without_groups_has_nothing_to_do() -> None:
    case = chain([3, 2])
    old = weights(case.model)
    assert bool(generated(program_of(case.plan)).run())
    assert same_bits(weights(case.model), old)


# ---- size of the program and of its memory ----


def calls(step: Eager) -> int:
    return sum(node.op.startswith("call") for node in step.module.graph.nodes)


@pytest.mark.parametrize("order", ["colored", "simultaneous"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("p", [2.0, math.inf])
def test_a_deeper_chain_is_no_longer_program(p: float, kind: str, order: str) -> None:
    sizes = []
    for depth in (10, 40):
        case = chain([3, *[6] * depth, 2], seed=depth, kind=kind, kernels=(3,))
        optimizer = SGD(case.model.parameters(), lr=1e-6, momentum=0.9)
        for parameter in case.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        step = generated(program_of(case.plan, p=p, order=order), optimizer)
        sizes.append(calls(step))
        check(case.model, case.plan, optimizer, p=p, order=order, tunings=(None,))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("order", ORDERS)
def test_equal_layers_at_uneven_distances(order: str) -> None:
    for p in (2.0, math.inf):
        case = chain([3, 6, 6, 6, 6, 6, 4, 6, 6, 6, 6, 6, 6, 6, 4, 6, 6, 6, 6, 2], seed=1)
        check(case.model, case.plan, trained(case), p=p, order=order)


def test_groups_that_are_numbered_last_to_first() -> None:
    depth = 8
    case = chain([3, *[6] * depth, 2], seed=1)
    groups = [range(6 * k, 6 * k + 6) for k in reversed(range(depth))]
    labels: Labels = {"layer_00.weight": [(1, groups[0], 0)]}
    for k in range(1, depth):
        labels[f"layer_{k:02d}.weight"] = [(1, groups[k], 0), (-1, groups[k - 1], 1)]
    labels[f"layer_{depth:02d}.weight"] = [(-1, groups[-1], 1)]
    layers = {name.rsplit(".", 1)[0]: 1 for name, _ in case.model.named_parameters()}
    plan = make_plan(case.model, [6] * depth, labels, layers)
    for order in ORDERS:
        check(case.model, plan, order=order)


def test_in_a_chain_every_matrix_is_squared_once_a_cycle() -> None:
    depth = 7
    case = chain([5, *[6] * (depth + 1), 5])
    for cycles in (1, 3):
        code = generated(program_of(case.plan), cycles=cycles, tuning=Tuning(0, 36)).code
        assert code.count("out=slot_0)") + code.count("out=slot_1)") == cycles * depth


def allocated(step: Eager) -> int:
    """The largest allocation of a run, in bytes."""
    step.run()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step.run()
    return max(event.cpu_memory_usage for event in profile.events() if event.name == "[memory]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_no_step_allocates_a_weight(kind: str, dtype: torch.dtype) -> None:
    case = chain([32, *[96] * 5, 32], kind=kind, kernels=(3,))
    case.model.to(dtype)
    optimizer = SGD(case.model.parameters(), lr=1e-6, momentum=0.9)
    for parameter in case.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    weight = case.model.get_parameter("layer_02.weight")
    for order in ORDERS:
        step = generated(program_of(case.plan, order=order), optimizer, tuning=Tuning(512, 2048))
        assert allocated(step) < weight.numel() * weight.itemsize / 2


def test_workspaces_are_a_few_layers() -> None:
    case = chain([256, *[256] * 12, 256], bias=False)
    case.model.float()
    for order in ORDERS:
        step = generated(program_of(case.plan, order=order))
        written = {p.data_ptr() for p in case.model.parameters()}
        memory = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in step.arguments}
        room = sum(s.nbytes() for at, s in memory.items() if at not in written)
        assert room < 4 * 256 * 256 * 4


# ---- the program, for people ----


def test_the_code_can_be_read_and_run() -> None:
    case = make("chain-linear", seed=3)
    step = generated(program_of(case.plan), trained(case))
    assert "    # group 1: layer_01.weight -> layer_02.weight, 7 channels\n" in step.code
    assert "torch.mv(layer_02_weight_cells_t, ones_9, out=outgoing_1)" in step.code
    assert "layer_01_weight_buffer" in step.code
    assert max(map(len, step.code.splitlines())) <= 110
    assert step.code.rstrip().endswith("return ok")
    old = copied(tensors_of(case.model))
    namespace: dict[str, Any] = {"torch": torch, "inf": math.inf}
    exec(step.code, namespace)
    assert bool(namespace["forward"](None, *step.arguments))
    by_text = copied(tensors_of(case.model))
    restore_(tensors_of(case.model), old)
    assert bool(step.module(*step.arguments))
    assert same_bits(tensors_of(case.model), by_text)
    assert not same_bits(by_text, old)


def test_names_that_collide_or_begin_with_a_digit() -> None:
    layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    model = nn.ModuleDict({"0": layers, "number_1": nn.Linear(2, 3)})
    full = Net(lambda net, x: net.all["number_1"](torch.relu(net.all["0"](x))), all=model)
    fill_(full, 1)
    labels: Labels = {
        "all.0.0.weight": [(1, range(4), 0)],
        "all.0.2.weight": [(-1, range(4), 1)],
        "all.0.4.weight": [(1, range(4, 6), 0)],
        "all.number_1.weight": [(-1, range(4, 6), 1)],
    }
    depth = {"all.0.0": 1, "all.0.2": 2, "all.0.4": 3, "all.number_1": 4}
    plan = make_plan(full, [4, 2], labels, depth)
    check(full, plan)
    code = generated(program_of(plan)).code
    assert "all_0_0_weight" in code
    compile(code, "step", "exec")
