"""Recording a model: nothing is left behind, nothing that happens to a tensor goes unseen."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enorm_fx import analyze
from enorm_fx.errors import TraceError
from enorm_fx.tracing.op_keys import op_key
from tests.support.laws import randomized
from tests.support.tracing_kit import ROWS, L, sound, structure, two_layers
from tests.support.zoo_small import Net, parameter

# --- the model stays as it was -----------------------------------------------------------------


class Busy(nn.Module):
    """Writes into buffers and attributes, draws random numbers, and has hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = L(3, 4), nn.BatchNorm1d(4), L(4, 2)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))
        self.dropout, self.seen, self.calls = nn.Dropout(0.5), [], 0
        self.memory = {"last": [], "box": SimpleNamespace(value=None)}
        self.fail = False
        self.eval_part = nn.ReLU().eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        y = self.bn(self.a(x))
        self.mean.mul_(0.9).add_(y.mean(0), alpha=0.1)
        self.memory["last"].append(y)
        self.memory["box"].value = y
        self.seen.append(tuple(y.shape))
        self.newcomer = y
        z = self.b(self.dropout(self.eval_part(y)) + torch.rand(4))
        if self.fail:
            raise ValueError("on purpose")
        return z


def everything(model: Busy) -> dict[str, Any]:
    """All that a run could have changed."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "names": sorted(model.__dict__),
        "attributes": (model.calls, list(model.seen), list(model.memory["last"])),
        "box": model.memory["box"].value,
        "grad": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "enabled": torch.is_grad_enabled(),
        "global hooks": len(torch.nn.modules.module._global_forward_hooks),
        "function": torch.autograd.Function.__dict__["apply"],
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_analysis_leaves_the_model_as_it_was(training: bool, fail: bool, front_end: str) -> None:
    model = Busy().train(training)
    model.eval_part.eval()
    model.fail = fail
    model.a.register_forward_hook(lambda module, args, output: None)
    x = torch.randn(5, 3)
    before = everything(model)
    if fail:
        with pytest.raises(TraceError, match=r"on purpose|newcomer"):
            analyze(model, x, tracer=front_end)
    elif front_end == "symbolic":
        analyze(model, x, tracer=front_end)
    else:
        with pytest.raises(TraceError, match="newcomer"):  # what is kept is not in the graph
            analyze(model, x, tracer=front_end)
    after = everything(model)
    changed = [key for key in before if not same(before[key], after[key])]
    assert changed == []


def test_the_comparison_sees_each_change() -> None:
    model = Busy()
    before = everything(model)
    model(torch.randn(5, 3))
    random.random()
    after = everything(model)
    changed = {key for key in before if not same(before[key], after[key])}
    assert {"state", "names", "attributes", "torch", "python"} <= changed


def test_the_caller_s_inputs_are_not_written() -> None:
    x = torch.randn(5, 3)
    before = x.clone()
    analyze(nn.Sequential(nn.ReLU(inplace=True), L(3, 2)), x)
    assert torch.equal(x, before)


# --- spellings, sharing ------------------------------------------------------------------------


def test_module_function_method_and_operator_give_the_same_plan() -> None:
    weights = [parameter(4, 3), parameter(4), parameter(2, 4), parameter(2)]
    named = dict(zip(("w", "c", "v", "d"), weights, strict=True))
    a, b = L(3, 4), L(4, 2)
    a.weight, a.bias, b.weight, b.bias = weights
    models = [
        nn.Sequential(a, nn.ReLU(), b),
        Net(lambda m, x: F.linear(F.relu(F.linear(x, m.w, m.c)), m.v, m.d), **named),
        Net(lambda m, x: m.b(torch.relu(m.a(x))), a=a, b=b),
        Net(lambda m, x: m.b(m.a(x).relu_()), a=a, b=b),
        Net(lambda m, x: m.b(m.a(x).clamp(min=0)), a=a, b=b),
        Net(lambda m, x: m.b(torch.maximum(m.a(x), torch.zeros(()))), a=a, b=b),
        Net(lambda m, x: torch.add(torch.matmul(F.relu(x @ m.w.t() + m.c), m.v.T), m.d), **named),
    ]
    plans = [analyze(model, torch.randn(5, 3)) for model in models]
    assert plans[0].num_scales == 4
    assert all(structure(plan) == structure(plans[0]) for plan in plans[1:6])
    assert plans[6].num_scales == 4


def test_shared_modules_have_one_label() -> None:
    shared = L(3, 3)
    model = nn.Sequential(L(3, 3), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), L(3, 1))
    plan = analyze(model.double(), ROWS)
    assert [p.name for p in plan.parameters].count("2.weight") == 1
    assert {p.name: p.aliases for p in plan.parameters}["2.weight"] == ("4.weight",)
    assert sound(model) == 3


def test_shared_parameters_have_one_label() -> None:
    model = nn.Sequential(L(3, 3), nn.ReLU(), L(3, 3), nn.ReLU(), L(3, 1)).double()
    model[2].weight = model[0].weight
    plan = analyze(model, ROWS)
    assert {p.name: p.aliases for p in plan.parameters}["0.weight"] == ("2.weight",)
    assert sound(model) == 1


@pytest.mark.parametrize("kind", ["view", "transpose", "same storage", "tensor"])
def test_parameters_that_share_memory_stay(kind: str) -> None:
    model = nn.Sequential(L(4, 4), nn.ReLU(), L(4, 4), nn.ReLU(), L(4, 2)).double()
    memory = model[0].weight.data
    if kind == "view":
        model[2].weight = nn.Parameter(memory.view(4, 4))
    elif kind == "transpose":
        model[2].weight = nn.Parameter(memory.t())
    elif kind == "same storage":
        model[2].bias = nn.Parameter(memory[1])
    else:
        model[2].register_forward_hook(lambda m, a, y: y + memory.sum())
    plan = analyze(model, torch.randn(5, 4).double())
    moved = {p.name for p in plan.parameters if p.terms}
    shared = {"view": {"2.weight"}, "transpose": {"2.weight"}, "same storage": {"2.bias"}}
    assert not moved & ({"0.weight"} | shared.get(kind, set()))
    assert any("memory is shared" in b.reason for b in plan.blocked)


# --- constants, branches, what leaves ----------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "scales"),
    [
        (lambda m, x: m.b(m.a(x).relu() + torch.ones(4)), 0),
        (lambda m, x: m.b(m.a(x).relu() * torch.tensor([1.0, 2.0, 3.0, 4.0])), 4),
        (lambda m, x: m.b(m.a(x).relu() + torch.zeros(4)), 4),
        (lambda m, x: m.b(m.a(x).relu() + torch.eye(4)[0]), 0),
        (lambda m, x: m.b(m.a(x).relu()[:, torch.tensor([3, 2, 1, 0])]), 4),
        (lambda m, x: m.b(m.a(x).relu() + m.shift), 0),
        (lambda m, x: m.b(m.a(x).relu() * m.shift), 4),
    ],
)
def test_constants_made_in_forward(run: Callable[..., Any], scales: int) -> None:
    assert sound(two_layers(run, shift=torch.zeros(4))) == scales


def test_zeros_that_are_written_into_are_no_zeros() -> None:
    def one_hot(m: Any, x: Tensor) -> Tensor:
        shift = torch.zeros(4, dtype=x.dtype)
        shift[0] = 1.0
        return m.b(m.a(x).relu() + shift)

    def view(m: Any, x: Tensor) -> Tensor:
        shift = torch.zeros(4, dtype=x.dtype)
        seen = shift[1:].view(3)
        shift.add_(1.0)
        return m.b(m.a(x).relu() + F.pad(seen, (1, 0)))

    assert sound(two_layers(one_hot)) == 3
    assert sound(two_layers(view)) == 1


def test_a_branch_on_data_names_the_module_and_the_line() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = nn.Sequential(L(3, 4), nn.Sequential(nn.ReLU(), Inner()), L(4, 2))
    with pytest.raises(TraceError, match=r"in module '1\.1'.*test_tracing\.py:\d+") as error:
        analyze(model, torch.randn(5, 3), tracer="symbolic")
    assert "reads into Python" in str(error.value)


@pytest.mark.parametrize("read", [Tensor.item, Tensor.tolist, float, bool, lambda t: f"{t:.2f}"])
def test_values_read_into_python_are_refused(read: Callable[[Tensor], Any]) -> None:
    model = two_layers(lambda m, x: m.b(m.a(x).relu()) * (1 if read(x.sum()) else 2))
    with pytest.raises(TraceError):
        analyze(model, ROWS)


def test_a_path_that_python_draws_is_refused() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return m.b(y + 1 if random.random() < 0.5 else y)

    with pytest.raises(TraceError, match="draws random numbers in Python"):
        analyze(two_layers(run), ROWS)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad  # not the derivative: the forward pass alone does not tell


def test_custom_autograd_functions_pin() -> None:
    plan = analyze(two_layers(lambda m, x: m.b(Doubled.apply(m.a(x).relu()))), ROWS)
    assert plan.num_scales == 0
    assert any("Doubled" in b.reason for b in plan.blocked)


def test_what_a_custom_function_reads_besides_its_arguments_stays() -> None:
    held: list[Tensor] = []

    class Peek(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x + held[0].sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    def run(m: Any, x: Tensor) -> Tensor:
        held[:] = [m.a(x) if m.activation else m.a.weight]
        y = m.b(m.a(x).relu()) + Peek.apply(x.sum(1, keepdim=True))
        held.clear()
        return y

    for activation in (True, False):
        model = two_layers(run)
        model.activation = activation  # type: ignore[assignment]
        assert sound(model) == 0


def test_checkpointing_pins_or_is_seen_through() -> None:
    from torch.utils.checkpoint import checkpoint

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        other = checkpoint(m.c, x.sum(1, keepdim=True).expand(-1, 4), use_reentrant=m.reentrant)
        return m.b((m.c(y) + other).relu())

    x = ROWS.clone().requires_grad_()
    for reentrant, scales in ((True, 0), (False, 4)):
        model = two_layers(run, c=L(4, 4))
        model.reentrant = reentrant  # type: ignore[assignment]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no input requires a gradient
            assert sound(model, x) == scales


OUTSIDE: list[Tensor] = []


@pytest.mark.parametrize("place", ["attribute", "buffer", "list", "object", "outside", "in place"])
def test_a_tensor_that_is_kept_is_an_output(place: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        if place == "attribute":
            m.last = y
        elif place == "buffer":
            m.state = y[0]
        elif place == "list":
            m.history.append({"y": y})
        elif place == "object":
            m.box.value = y
        elif place == "outside":
            OUTSIDE.append(y)
        else:
            m.state.copy_(y[0])
        return m.b(y.relu())

    model = two_layers(run, state=torch.zeros(4))
    model.history, model.box = [], SimpleNamespace(value=None)  # type: ignore[assignment]
    plan = analyze(model, ROWS)
    OUTSIDE.clear()
    assert plan.num_scales == 0
    assert model.history == []
    assert model.box.value is None


def test_a_hook_that_stores_features_makes_them_outputs() -> None:
    features: dict[str, Tensor] = {}
    model = nn.Sequential(L(3, 4), nn.ReLU(), L(4, 3), nn.ReLU(), L(3, 2)).double()
    model[0].register_forward_hook(lambda m, a, y: features.update(first=y))
    assert analyze(model, ROWS).num_scales == 3


def test_an_output_that_is_a_view_does_not_make_the_rest_an_output() -> None:
    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        p, q = m.a(x).chunk(2, dim=1)
        return p, m.b(q.relu())

    assert sound(randomized(Net(run, a=L(3, 4), b=L(2, 2)))) == 2


def test_hooks_that_change_what_flows_are_seen() -> None:
    model = nn.Sequential(L(3, 4), nn.ReLU(), L(4, 2)).double()
    handle = model[1].register_forward_hook(lambda m, a, y: y.tanh())
    assert sound(model) == 0
    handle.remove()
    assert sound(model) == 4
    model.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    assert sound(model) == 4


# --- unknown ops and the report ----------------------------------------------------------------


def test_an_unknown_op_pins_and_is_reported_with_the_user_s_line() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.special.i0(m.a(x)))  # this line

    plan = analyze(two_layers(run), ROWS)
    assert plan.num_scales == 0
    (blocked,) = [b for b in plan.blocked if (b.weight, b.side) == ("a.weight", "output")]
    assert "i0" in blocked.reason
    file, line = re.fullmatch(r"(.*):(\d+)", blocked.source).groups()  # type: ignore[union-attr]
    assert file == __file__
    assert "this line" in Path(file).read_text().splitlines()[int(line) - 1]


def test_a_function_of_the_user_s_that_is_called_relu_is_not_torch_s() -> None:
    def relu(x: Tensor) -> Tensor:
        return x

    assert op_key(torch.relu) == ("relu", False)
    assert op_key(torch.relu_) == ("relu", True)
    assert op_key(torch.ops.aten.relu_.default) == ("relu", True)
    assert op_key(relu)[0] != "relu"


def test_a_result_of_an_earlier_computation_that_a_model_holds_is_a_constant() -> None:
    model = two_layers(lambda m, x: m.b(m.a(x).relu() * m.held))
    model.held = (torch.ones(4, requires_grad=True) * 2).exp()  # type: ignore[assignment]
    assert sound_without_copy(model) == 4


def sound_without_copy(model: nn.Module) -> int:
    """The number of scales; such a model cannot be copied."""
    plan = analyze(model, ROWS)
    before = model(ROWS)
    plan.rescale_(0.3 * torch.ones(plan.num_scales, dtype=torch.float64))
    torch.testing.assert_close(model(ROWS), before)
    return plan.num_scales
