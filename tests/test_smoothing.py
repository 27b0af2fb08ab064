"""Laws of smoothing: the function stays, activations and weights meet where the formula says."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import enorm_fx
from enorm_fx import Smoothing, analyze, smooth
from enorm_fx.calibration import closed_form
from enorm_fx.errors import ArgumentError, NonFiniteError
from tests.support.helpers import largest_error, random_scales, same_bits, weights
from tests.support.laws import deviation, randomized, run_again
from tests.support.zoo_kit import Net
from tests.support.zoo_networks import NETWORKS, Llama, Opt
from tests.support.zoo_small import ZOO

L, C = nn.Linear, nn.Conv2d
METHODS = ("smoothquant", "awq")


def data(*shape: int, count: int = 3, seed: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]


def tokens(*shape: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 5, shape, generator=generator) for _ in range(count)]


# ---- the function stays ----


@pytest.mark.parametrize(
    ("network", "method"),
    [*itertools.product(NETWORKS.values(), METHODS), *((small, "smoothquant") for small in ZOO)],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_function_is_kept(network: Any, method: str) -> None:
    model, inputs = randomized(network.build()).eval(), network.inputs()
    before = run_again(model, inputs)
    report = smooth(model, [inputs], method=method)
    assert deviation(run_again(model, inputs), before) < 1e-9
    assert report.gap == 0


# ---- the closed form, measured with modules' own hooks ----


def read_by(model: nn.Module, layers: Iterable[str], batches: list[Tensor]) -> dict[str, Tensor]:
    """max |x| of what each layer reads, by channel of the last axis or, for convolutions, of the
    second one."""
    found: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            axis = 1 if isinstance(module, C) else -1
            largest = args[0].detach().abs().movedim(axis, -1).flatten(0, -2).amax(0)
            found[name] = torch.maximum(found.get(name, largest), largest)

        return module.register_forward_pre_hook(hook)

    hooks = [watch(name, model.get_submodule(name)) for name in layers]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return found


def columns(model: nn.Module, layer: str, groups: int = 1) -> Tensor:
    """max |w| by which a layer reads each channel."""
    weight = model.get_parameter(f"{layer}.weight").detach().abs()
    by_group = weight.unflatten(0, (groups, -1)).flatten(3) if weight.dim() > 2 else weight[None]
    largest = by_group.amax((1, 3)) if by_group.dim() == 4 else by_group.amax(1)
    return largest.flatten()


def worst_gap(
    model: nn.Module,
    batches: list[Tensor],
    readers: list[list[str]],
    alpha: float,
    channel: Callable[[str, Tensor], Tensor] = lambda name, values: values[None],
    groups: int = 1,
) -> float:
    """The largest |log| of X^alpha / W^(1 - alpha) over all channels that are alive.

    readers: the layers that read each group's activations; channel: brings a layer's channels into
    the shape (channels that share a scale, scales).
    """
    sizes = read_by(model, itertools.chain(*readers), batches)
    gaps = []
    for layers in readers:
        x = torch.cat([channel(name, sizes[name]) for name in layers]).amax(0)
        w = torch.cat([channel(name, columns(model, name, groups)) for name in layers]).amax(0)
        alive = (x > 0) & (w > 0)
        assert bool(alive.any())
        gaps.append((alpha * x.log() - (1 - alpha) * w.log())[alive].abs().max())
    return float(torch.stack(gaps).max())


def grouped_queries(name: str, values: Tensor) -> Tensor:
    """Four heads read the values of two, each two of them the same."""
    return values.view(2, 2, 4).transpose(0, 1).reshape(2, 8) if name == "o" else values[None]


def leaky(x: Tensor) -> Tensor:
    """No channel is dead after it."""
    return F.leaky_relu(x, 0.3)


def residual() -> nn.Module:
    """A residual stream without normalization: each scale depends on all others."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = leaky(m.a(x))
        for up, down in ((m.b, m.c), (m.d, m.e)):
            x = x + leaky(down(leaky(up(x))))
        return m.f(x)  # type: ignore[no-any-return]

    return Net(run, a=L(3, 4), b=L(4, 9), c=L(9, 4), d=L(4, 8), e=L(8, 4), f=L(4, 2))


KINDS: dict[str, tuple[Callable[[], nn.Module], list[Tensor], list[list[str]], dict[str, Any]]] = {
    "chain": (
        lambda: Net(lambda m, x: m.c(leaky(m.b(leaky(m.a(x))))), a=L(3, 8), b=L(8, 7), c=L(7, 2)),
        data(50, 3), [["b"], ["c"]], {},
    ),
    "llama": (
        lambda: Llama(16, 4, 4), tokens(6, 4),
        [["q", "k", "v"], ["o"], ["gate", "up"], ["down"], ["head"]], {},
    ),
    "llama, grouped queries": (
        lambda: Llama(16, 4, 2), tokens(6, 4),
        [["q", "k", "v"], ["o"], ["gate", "up"], ["down"], ["head"]],
        {"channel": grouped_queries},
    ),
    "residual": (residual, data(50, 3), [["b", "d", "f"], ["c"], ["e"]], {}),
    "convolutions": (
        lambda: Net(lambda m, x: m.c(leaky(m.b(leaky(m.a(x))))), a=C(2, 6, 3), b=C(6, 4, 3),
                    c=C(4, 3, 1)),
        data(4, 2, 8, 8), [["b"], ["c"]], {},
    ),
    "depthwise": (
        lambda: Net(lambda m, x: m.b(m.a(x).relu()), a=C(2, 6, 3), b=C(6, 6, 3, groups=6)),
        data(4, 2, 8, 8), [["b"]], {"groups": 6},
    ),
    "grouped": (
        lambda: Net(lambda m, x: m.b(m.a(x).relu()), a=C(2, 6, 3), b=C(6, 4, 3, groups=2)),
        data(4, 2, 8, 8), [["b"]], {"groups": 2},
    ),
    "squares": (
        lambda: Net(lambda m, x: m.b(m.a(x).relu() ** 2), a=L(3, 8), b=L(8, 2)),
        data(50, 3), [["b"]], {},
    ),
    "gated": (
        lambda: Net(lambda m, x: m.c(m.a(x).relu() * m.b(x)), a=L(3, 8), b=L(3, 8), c=L(8, 2)),
        data(50, 3), [["c"]], {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_and_weights_meet_in_the_closed_form(kind: str, alpha: float) -> None:
    make, batches, readers, how = KINDS[kind]
    model = randomized(make())
    assert worst_gap(model, batches, readers, alpha, **how) > 0.1
    report = smooth(model, batches, alpha=alpha)
    assert worst_gap(model, batches, readers, alpha, **how) < 1e-9
    assert report.largest_scale > 1.1


def test_one_group_takes_the_scales_of_the_paper() -> None:
    model = randomized(Net(lambda m, x: m.b(m.norm(x)), norm=nn.LayerNorm(6), b=L(6, 4)))
    batches, before = data(20, 6), weights(model)
    x = read_by(model, ["b"], batches)["b"]
    s = x**0.7 / before["b.weight"].abs().amax(0) ** 0.3
    report = smooth(model, batches, alpha=0.7)
    after = weights(model)
    assert torch.allclose(after["b.weight"], before["b.weight"] * s)
    assert torch.allclose(after["norm.weight"], before["norm.weight"] / s)
    assert torch.allclose(after["norm.bias"], before["norm.bias"] / s)
    assert report.largest_scale == pytest.approx(float(torch.maximum(s, 1 / s).max()))


@pytest.mark.parametrize("kind", ["chain", "llama, grouped queries", "residual", "convolutions"])
def test_every_rescaling_of_a_network_is_smoothed_to_the_same_weights(kind: str) -> None:
    make, batches, _, _ = KINDS[kind]
    model = randomized(make())
    plan = analyze(model, batches[0])
    smoothed = {g.start for g in plan.groups if "q.weight" not in g.producers}
    plan = plan.select(lambda group: group.start in smoothed)
    assert sum(done.dead for done in smooth(plan, batches).groups) == 0
    expected = weights(model)
    for seed in range(3):
        plan.rescale_(random_scales(plan, seed))
        assert largest_error(weights(model), expected) > 1e-2
        smooth(plan, batches)
        assert largest_error(weights(model), expected) < 1e-8


def test_a_gap_that_is_left_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    make, batches, readers, _ = KINDS["residual"]
    model = randomized(make())
    monkeypatch.setattr(closed_form, "_MAX_ROUNDS", 3)
    report = smooth(model, batches)
    assert 1e-12 < report.gap < 1
    assert worst_gap(model, batches, readers, 0.5) > 1e-9


# ---- AWQ ----


def quantized(weight: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Rows in runs of `group_size`, each rounded to 2^bits levels, zero one of them."""
    rows = []
    for row in weight.flatten(1):
        runs = []
        for run in row.split(group_size or len(row)):
            low, high = min(float(run.min()), 0.0), max(float(run.max()), 0.0)
            step = (high - low) / (2**bits - 1) or 1.0
            zero = round(-low / step)
            levels = ((run / step).round() + zero).clamp(0, 2**bits - 1) - zero
            runs.append(levels * step)
        rows.append(torch.cat(runs))
    return torch.stack(rows).view(weight.shape)


def output_error(model: nn.Module, other: dict[str, Tensor], batches: list[Tensor]) -> float:
    """Squared error of some layers' outputs, each by itself, when they have other weights."""
    total = 0.0

    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        changed = copy.copy(module)
        changed._parameters = {**module._parameters, "weight": other[names[module]]}
        total += float((changed.forward(*args) - output).square().sum())

    names = {model.get_submodule(name): name for name in other}
    handles = [module.register_forward_hook(hook) for module in names]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (3, 4), (2, None)])
@pytest.mark.parametrize("kind", ["chain", "llama", "convolutions", "depthwise", "residual"])
def test_the_search_never_loses_to_no_smoothing(
    kind: str, bits: int, group_size: int | None
) -> None:
    make, batches, readers, _ = KINDS[kind]
    model = randomized(make())
    original = copy.deepcopy(model)
    report = smooth(model, batches, method="awq", bits=bits, group_size=group_size)
    assert len(report.groups) == len(readers)
    # A depthwise filter has one channel, whose scale is the whole row's.
    assert any((done.error or 1) < 0.9 for done in report.groups) or kind == "depthwise"
    for layers, done in zip(readers, report.groups, strict=True):
        plain, smoothed = {}, {}
        for name in layers:
            before = original.get_parameter(f"{name}.weight").detach()
            after = model.get_parameter(f"{name}.weight").detach()
            plain[name] = quantized(before, bits, group_size)
            # In the units before: rows may have been scaled too, for what reads on.
            smoothed[name] = quantized(after, bits, group_size) * before / after
        error, without = (output_error(original, w, batches) for w in (smoothed, plain))
        assert done.error is not None
        assert error <= without * (1 + 1e-12)
        assert error / without == pytest.approx(done.error, rel=1e-6)


def test_the_search_takes_the_best_ratio() -> None:
    model = randomized(Net(lambda m, x: m.b(m.norm(x)), norm=nn.LayerNorm(12), b=L(12, 6)))
    batches = data(20, 12)
    with torch.no_grad():
        model.get_parameter("norm.weight")[3] *= 20
        x = torch.cat([model.norm(batch) for batch in batches])
    weight = model.get_parameter("b.weight").detach().clone()
    errors = []
    for r in torch.linspace(0, 1, 21).double():
        s = x.abs().mean(0) ** r
        s = s / (s.max() * s.min()).sqrt()
        errors.append(float(((quantized(weight * s, 3, 4) / s - weight) @ x.T).square().sum()))
    [done] = smooth(model, batches, method="awq", bits=3, group_size=4).groups
    best = min(range(21), key=errors.__getitem__)
    assert 0 < best < 20
    assert done.ratio == pytest.approx(best / 20)
    assert done.error == pytest.approx(errors[best] / errors[0])
    s = x.abs().mean(0) ** (best / 20)
    s = s / (s.max() * s.min()).sqrt()
    assert torch.allclose(model.get_parameter("b.weight"), weight * s)


def test_groups_that_one_weight_reads_share_a_ratio() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.c(torch.cat([leaky(m.a(x)), leaky(m.b(x))], -1))  # type: ignore[no-any-return]

    model = randomized(Net(run, a=L(3, 4), b=L(3, 5), c=L(9, 6)))
    first, second = smooth(model, data(20, 3), method="awq", bits=3).groups
    assert (first.ratio, first.error) == (second.ratio, second.error)
    assert first.group.producers != second.group.producers


# ---- what is left alone ----


def test_queries_and_keys_are_left_alone() -> None:
    model = randomized(Llama(16, 4, 2))
    report = smooth(model, tokens(6, 4))
    [(group, reason)] = report.left_out
    assert (group.producers, group.consumers) == (("q.weight",), ("k.weight",))
    assert "trades scales between weights" in reason
    assert len(report.groups) == 5
    assert report.channels == 16 + 8 + 16 + 6 + 16


def test_one_of_two_scales_of_a_channel_is_left_alone() -> None:
    batches = data(50, 3)
    model = randomized(
        Net(lambda m, x: m.c(m.a(x).relu() * m.b(x)), a=L(3, 8), b=L(3, 8), c=L(8, 2))
    )
    report = smooth(model, batches)
    assert [done.group.producers for done in report.groups] == [("a.weight",)]
    assert [(g.producers, why) for g, why in report.left_out] == [
        (("b.weight",), "another group scales the same activations")
    ]


@pytest.mark.parametrize("method", METHODS)
def test_dead_channels_keep_their_scale(method: str) -> None:
    model = randomized(Net(lambda m, x: m.b(leaky(m.a(x))), a=L(3, 6), b=L(6, 4)))
    with torch.no_grad():
        model.get_parameter("a.weight")[1] = 0
        model.get_parameter("a.bias")[1] = 0
        model.get_parameter("b.weight")[:, 4] = 0
    old = weights(model)
    [done] = smooth(model, data(50, 3), method=method).groups
    factors = weights(model)["b.weight"] / old["b.weight"]
    assert bool((factors[:, 1] == 1).all())
    if method == "smoothquant":  # AWQ's scales ask the activations alone
        assert same_bits({"a": weights(model)["a.weight"][4]}, {"a": old["a.weight"][4]})
    assert done.dead == (2 if method == "smoothquant" else 1)
    assert all(bool(w.isfinite().all()) for w in weights(model).values())


def test_a_layer_that_never_runs_is_left_alone() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.b(leaky(m.a(x)))
        return y if len(x) == 1 else m.c(leaky(y))  # type: ignore[no-any-return]

    model = randomized(Net(run, a=L(3, 4), b=L(4, 2), c=L(2, 3)))
    plan = analyze(model, data(5, 3)[0])
    report = smooth(plan, data(1, 3))
    assert [done.group.consumers for done in report.groups] == [("b.weight",)]
    [(group, reason)] = report.left_out
    assert group.consumers == ("c.weight",)
    assert "no call that reads its activations was seen" in reason


def test_a_model_without_groups_is_left_as_it_is() -> None:
    model = nn.Linear(3, 4)
    old = weights(model)
    report = smooth(model, [torch.randn(2, 3)])
    assert (report.groups, report.left_out, report.largest_scale) == ((), (), 1.0)
    assert same_bits(weights(model), old)


# ---- dtypes ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_keep_the_function_to_their_rounding(dtype: torch.dtype, method: str) -> None:
    model, batches = randomized(Opt(tied=False)).to(dtype), tokens(6, 4)
    with torch.no_grad():
        before = model(batches[0]).double()
        smooth(model, batches, method=method)
        after = model(batches[0]).double()
    assert all(p.dtype == dtype for p in model.parameters())
    assert float((after - before).abs().max() / before.abs().max()) < 20 * torch.finfo(dtype).eps


def test_no_factor_leaves_the_range_of_half_precision() -> None:
    model = Net(lambda m, x: m.b(leaky(m.a(x))), a=L(3, 6), b=L(6, 4)).half()
    with torch.no_grad():
        model.get_parameter("a.weight")[2] = 1e-7
        model.get_parameter("a.bias")[2] = 0
        model.get_parameter("b.weight")[:, 2] = 1e4
    [done] = smooth(model, [torch.ones(2, 3).half()], alpha=0.9).groups
    assert 1e3 < done.largest_scale < 65504
    assert all(bool(w.isfinite().all()) for w in weights(model).values())


# ---- all or nothing ----


@pytest.mark.parametrize("method", METHODS)
def test_activations_that_are_not_finite_are_named(method: str) -> None:
    make, batches, _, _ = KINDS["chain"]
    model = randomized(make())
    old = weights(model)
    batches = [*batches, torch.full((2, 3), math.nan, dtype=torch.float64)]
    with pytest.raises(NonFiniteError, match=r"'b.weight' read activations that are not finite"):
        smooth(model, batches, method=method)
    assert same_bits(weights(model), old)


def test_weights_that_are_not_finite_are_named() -> None:
    make, batches, _, _ = KINDS["chain"]
    model = randomized(make())
    with torch.no_grad():
        model.get_parameter("c.weight")[0, 0] = math.inf
    old = weights(model)
    with pytest.raises(NonFiniteError, match=r"'c.weight' has entries that are not finite"):
        smooth(model, batches)
    assert same_bits(weights(model), old)


def test_a_batch_that_fails_changes_nothing() -> None:
    make, batches, _, _ = KINDS["chain"]
    model = randomized(make()).train()
    old = weights(model)
    with pytest.raises(ArgumentError, match="on batch 3 the model raised RuntimeError"):
        smooth(model, [*batches, torch.randn(2, 5)])
    assert same_bits(weights(model), old)
    assert model.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0}, "alpha must be above 0 and at most 1, not 0"),
        ({"alpha": 1.5}, "alpha must be above 0"),
        ({"alpha": True}, "alpha must be above 0"),
        ({"method": "gptq"}, "method must be one of"),
        ({"bits": 0}, "bits must be an integer >= 1"),
        ({"bits": 32}, "bits must be at most 16"),
        ({"group_size": 0}, "group_size must be an integer >= 1"),
        ({"batches": torch.zeros(2, 3)}, "batches must be an iterable of inputs"),
        ({"batches": 3}, "batches must be an iterable of inputs"),
        ({"batches": []}, "batches is empty"),
        ({"batches": iter([torch.zeros(2, 3)]), "method": "awq"}, "twice"),
        ({"model_or_plan": "model"}, "must be a torch.nn.Module"),
    ],
)
def test_arguments_are_checked(settings: dict[str, Any], message: str) -> None:
    model = KINDS["chain"][0]()
    arguments = {"model_or_plan": model, "batches": [torch.zeros(2, 3)], **settings}
    with pytest.raises(ArgumentError, match=message):
        smooth(**arguments)


def test_a_plan_that_does_not_keep_the_function_is_refused() -> None:
    model = nn.Sequential(L(3, 4), nn.BatchNorm1d(4), nn.ReLU(), L(4, 2)).eval()
    inputs = torch.randn(5, 3)
    with pytest.raises(ArgumentError, match="batchnorm='affine'"):
        smooth(analyze(model, inputs), [inputs])
    assert len(smooth(model, [inputs]).groups) == 1


# ---- what it takes ----


def test_an_iterator_a_list_and_a_plan_give_the_same() -> None:
    make, batches, _, _ = KINDS["chain"]
    model = randomized(make())
    results = []
    for start in (
        lambda m: smooth(m, batches),
        lambda m: smooth(m, iter(batches)),
        lambda m: smooth(analyze(m, batches[0]), (batch for batch in batches)),
        lambda m: smooth(m, torch.utils.data.DataLoader(torch.cat(batches), batch_size=7)),
    ):
        other = copy.deepcopy(model)
        report = start(other)
        results.append((report.channels, weights(other)))
    for channels, found in results[1:]:
        assert channels == results[0][0]
        assert largest_error(found, results[0][1]) < 1e-12


def test_frozen_weights_are_smoothed() -> None:
    make, batches, _, _ = KINDS["chain"]
    model = randomized(make()).requires_grad_(False)
    assert len(smooth(model, batches).groups) == 2


def test_the_report_is_true_and_cannot_be_changed() -> None:
    make, batches, _, _ = KINDS["chain"]
    model = randomized(make())
    old = weights(model)
    report = enorm_fx.smooth(model, batches)
    assert isinstance(report, Smoothing)
    assert (report.method, report.batches, report.channels) == ("smoothquant", 3, 15)
    for done, name in zip(report.groups, ("a.bias", "b.bias"), strict=True):
        factors = weights(model)[name] / old[name]
        assert done.largest_scale == pytest.approx(float(torch.maximum(factors, 1 / factors).max()))
        assert (done.ratio, done.error, done.dead) == (None, None, 0)
    with pytest.raises(AttributeError):
        report.gap = 1.0  # type: ignore[misc]
