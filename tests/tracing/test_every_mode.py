"""A plan holds in every mode that code can ask for, and for every call."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, nn

import enorm_fx
from enorm_fx.errors import TraceError
from enorm_fx.tracing import every_mode
from tests.support.tracing_kit import ROWS, sound, two_layers

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


class Auxiliary(nn.Module):
    """A second head that reads a hidden layer while training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)
        self.aux = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = F.relu(self.a(x))
        result = self.c(F.relu(self.b(hidden)))
        return (result, self.aux(hidden), hidden[:, :1]) if self.training else (result,)


class Unready(Auxiliary):
    """It cannot run while training."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.training:
            raise ValueError("targets are missing")
        return super().forward(x)


@pytest.mark.parametrize("analyzed", [True, False])
@pytest.mark.parametrize("used", [True, False])
def test_a_plan_made_in_one_mode_is_sound_in_the_other(analyzed: bool, used: bool) -> None:
    model = Auxiliary().train(analyzed)
    plan = enorm_fx.analyze(model, X)
    model.train(used)
    assert plan.num_scales == 3 + 5  # the first channel of the hidden layer leaves the model
    assert enorm_fx.verify(plan, X).largest_change < 1e-12


def test_one_mode_alone_would_not_be_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every_mode, "is_users", lambda module: False)
    model = Auxiliary().eval()
    plan = enorm_fx.analyze(model, X)
    model.train()
    assert enorm_fx.verify(plan, X).largest_change > 1e-3


def test_a_mode_that_one_front_end_cannot_trace_is_left_to_the_other_in_that_mode() -> None:
    """While training, it makes what torch.export alone can trace, and a channel leaves."""

    class Mapped(Auxiliary):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            hidden = F.relu(self.a(x))
            result = self.c(F.relu(self.b(hidden)))
            if self.training:
                return torch.vmap(lambda row: row * 2)(result), hidden[:, :1]
            return (result,)

    plan = enorm_fx.analyze(Mapped().eval(), X)
    assert plan.num_scales == 3 + 5
    assert plan.notes == ()


def test_every_module_is_left_in_its_own_mode() -> None:
    model = Auxiliary().train()
    model.b.eval()
    enorm_fx.analyze(model, X)
    assert [m.training for m in model.modules()] == [True, True, False, True, True]


def test_the_graph_shows_the_mode_that_the_model_is_in() -> None:
    shown = [len(enorm_fx.analyze(Auxiliary().train(mode), X).graph) for mode in (True, False)]
    assert shown[0] > shown[1]


def test_scales_of_the_other_mode_alone_do_not_count() -> None:
    model = Auxiliary().eval()
    model.aux = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2))  # type: ignore[assignment]
    assert enorm_fx.analyze(model, X).num_scales == 3 + 5
    assert enorm_fx.analyze(model.train(), X).num_scales == 3 + 5 + 7


def test_a_mode_that_cannot_be_traced_is_noted() -> None:
    plan = enorm_fx.analyze(Unready().eval(), X)
    assert plan.num_scales == 4 + 5
    [note] = plan.notes
    assert "evaluation mode only" in note
    assert "targets are missing" in note


def traces_of(model: nn.Module, monkeypatch: pytest.MonkeyPatch, inputs: Any = X) -> int:
    """How many traces the plan of a model joins."""
    counts: list[int] = []
    original = every_mode.joined

    def counting(traces: Any, notes: Any) -> Any:
        counts.append(len(traces))
        return original(traces, notes)

    monkeypatch.setattr(every_mode, "joined", counting)
    enorm_fx.analyze(model, inputs)
    return counts[0]


class Dropping(nn.Module):
    """It passes its mode on to torch, whose rules hold in both."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5 if self.training else 0.0, training=self.training)
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if self.training else 0.0)


def test_a_mode_that_is_only_passed_on_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), Dropping())
    assert traces_of(model, monkeypatch) == 1
    assert traces_of(Auxiliary(), monkeypatch) == 2


# --- other questions that code may ask ---------------------------------------------------------


def by_name() -> bool:
    return torch.is_grad_enabled()


def helped(m: Any, x: Tensor) -> bool:
    return by_name()


QUESTIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "grad": lambda m, x: torch.is_grad_enabled(),
    "grad by a name of its own": lambda m, x: is_grad_enabled(),
    "grad in a helper": helped,
    "grad through map": lambda m, x: next(map(lambda f: f(), [torch.is_grad_enabled])),
    "grad of a tensor": lambda m, x: m.a(x).requires_grad,
    "a leaf": lambda m, x: not m.a(x).is_leaf,
    "a gradient's function": lambda m, x: m.a(x).grad_fn is not None,
    "inference": lambda m, x: torch.is_inference_mode_enabled(),
    "autocast": lambda m, x: torch.is_autocast_enabled("cpu"),
    "autocast of the GPU": lambda m, x: torch.is_autocast_enabled(),
    "both": lambda m, x: torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled(),
    "neither": lambda m, x: torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
    "either": lambda m, x: torch.is_grad_enabled() ^ torch.is_inference_mode_enabled(),
    "training alone": lambda m, x: m.training and not torch.is_grad_enabled(),
    "evaluation with gradients": lambda m, x: not m.training and torch.is_grad_enabled(),
    "getattr": lambda m, x: getattr(m, "train" + "ing"),
}


@contextmanager
def answers(grad: bool, inference: bool, autocast: bool) -> Iterator[None]:
    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        before = [torch.is_autocast_enabled(d) for d in ("cpu", "cuda")]
        for device in ("cpu", "cuda"):
            torch.set_autocast_enabled(device, autocast)
        try:
            yield
        finally:
            for device, was in zip(("cpu", "cuda"), before, strict=True):
                torch.set_autocast_enabled(device, was)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_a_plan_holds_whatever_the_answer_is(question: str, training: bool) -> None:
    """One path leaves channel 0 alone, the other channel 1: in both modes, both must stay."""
    ask, answered = QUESTIONS[question], []

    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.a(x)
        answered.append(bool(ask(m, x)))
        return m.b(y.relu()), y[:, 0] if answered[-1] else y[:, 1]

    model = two_layers(run).train(training)
    plan = enorm_fx.analyze(model, ROWS)
    assert set(answered) == {True, False}
    assert plan.num_scales == 2
    assert model.training is training


def test_nothing_of_a_question_stays_behind() -> None:
    model = two_layers(lambda m, x: m.b(m.a(x).relu()) if torch.is_grad_enabled() else m.b(m.a(x)))
    for state in product((True, False), repeat=3):
        with answers(*state):
            before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            enorm_fx.analyze(model, ROWS)
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
            assert torch.is_autocast_enabled("cpu") is state[2]
    assert sys.getprofile() is None


def test_a_profiler_is_left_alone() -> None:
    def profiler(frame: Any, event: str, argument: Any) -> None:
        return None

    def run(m: Any, x: Tensor) -> Tensor:
        asked = torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
        return m.b(m.a(x).tanh() if asked else m.a(x).relu())

    model = two_layers(run)
    sys.setprofile(profiler)
    try:
        plan = enorm_fx.analyze(model, ROWS)
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)
    assert plan.num_scales == 0


def test_questions_whose_answer_changes_nothing_cost_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        asked = torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False) if asked else nullcontext():
            return m.b(m.a(x).relu())

    assert traces_of(two_layers(run), monkeypatch, ROWS) == 1


def test_gradients_may_be_set_up_in_the_forward_pass() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad)
            y.retain_grad()
        z = y.detach().requires_grad_()
        return m.b(y.relu()) + z.relu().sum() * 0 if m.joined else m.b(y.relu())

    model = two_layers(run)
    model.joined = False  # type: ignore[assignment]
    assert sound(model) == 4
    assert model.a.weight.grad is None


# --- the same in every call --------------------------------------------------------------------


def counting(path: Callable[[int], bool]) -> Callable[..., Tensor]:
    """It takes one path or the other by how often it was called."""

    def run(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        return m.b(m.a(x).relu() if path(m.calls) else m.a(x).tanh())

    return run


@pytest.mark.parametrize(
    "path",
    [lambda n: n % 2, lambda n: n % 2 == 0, lambda n: n > 1, lambda n: n % 3, lambda n: n < 8],
)
def test_a_model_that_counts_its_calls_is_refused(path: Callable[[int], bool]) -> None:
    model = two_layers(counting(path))
    model.calls = 0  # type: ignore[assignment]
    with pytest.raises(TraceError, match=r"does not do the same in every call") as error:
        enorm_fx.analyze(model, ROWS)
    assert len(re.findall(r"'(relu|tanh)' at \S+test_every_mode\.py:\d+", str(error.value))) == 2
    assert model.calls == 0


def test_what_changes_outside_of_the_model_is_refused() -> None:
    turns = itertools.cycle([True, False])
    clock = iter(range(1000))
    for path in (lambda: next(turns), lambda: next(clock) % 2):

        def run(m: Any, x: Tensor, path: Any = path) -> Tensor:
            return m.b(m.a(x).relu() if path() else m.a(x).tanh())

        with pytest.raises(TraceError, match="does not do the same in every call"):
            enorm_fx.analyze(two_layers(run), ROWS)


def test_a_model_that_gives_other_outputs_by_turns_is_refused() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        y, z = m.a(x), m.b(m.a(x).relu())
        return y if m.calls % 2 else z

    model = two_layers(run)
    model.calls = 0  # type: ignore[assignment]
    with pytest.raises(TraceError, match="some outputs"):
        enorm_fx.analyze(model, ROWS)


def test_a_count_that_decides_nothing_is_noted() -> None:
    model = two_layers(counting(lambda n: True))
    model.calls = 0  # type: ignore[assignment]
    plan = enorm_fx.analyze(model, ROWS)
    assert plan.num_scales == 4
    assert any("Every call changes calls" in note for note in plan.notes)


def test_a_model_that_prepares_in_its_first_call_holds_before_and_after() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        if m.table is None:
            m.table = torch.arange(4.0, dtype=x.dtype)
            return m.b(y.relu() * m.table) + y[:, :1] * 0.5
        return m.b(y.relu() * m.table) + y[:, 1:2] * 0.5

    model = two_layers(run)
    model.table = None  # type: ignore[assignment]
    assert enorm_fx.analyze(model, ROWS).num_scales == 2
    assert model.table is None


def test_a_state_that_is_carried_from_call_to_call() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        m.state = m.a(x).relu() + m.state.tanh()
        m.scale = 0.9 * m.scale
        return m.b(m.state) * m.scale

    model = two_layers(run, state=torch.zeros(4))
    model.scale = 1.0  # type: ignore[assignment]
    plan = enorm_fx.analyze(model, ROWS)
    assert plan.num_scales == 0
    assert model.scale == 1.0


def test_a_shape_that_is_changed_in_place_is_no_difference() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).unsqueeze_(0)
        if y.dim() != 3:
            raise ValueError("the shape of an earlier run")
        return m.b(y.relu().squeeze_(0))

    assert sound(two_layers(run)) == 4
    turns = itertools.cycle([True, False])
    other = two_layers(lambda m, x: m.b(m.a(x).unsqueeze_(0).pow(1 if next(turns) else 2)))
    with pytest.raises(TraceError, match="does not do the same"):
        enorm_fx.analyze(other, ROWS)


def test_export_sees_a_count_too() -> None:
    model = two_layers(counting(lambda n: n % 2 == 1))
    model.calls = 0  # type: ignore[assignment]
    with pytest.raises(TraceError, match="does not do the same in every call"):
        enorm_fx.analyze(model, ROWS, tracer="export")


def test_parameters_that_are_outputs_stay() -> None:
    model = two_layers(lambda m, x: (m.b(m.a(x).relu()), m.a.weight))
    assert sound(model) == 0
