"""BatchNorm is folded only where that is proved, and a model that it might change is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enorm_fx.errors import ArgumentError, TraceError
from enorm_fx.folding import batchnorm
from enorm_fx.folding.batchnorm import fold_batchnorm_
from enorm_fx.tracing import trace
from enorm_fx.verifying import relative_change
from tests.support.folding_kit import EXACT, IMAGES, numbers, outputs, trained
from tests.support.zoo_small import Net

C, L, B = nn.Conv2d, nn.Linear, nn.BatchNorm2d


# ---- what is left alone ----


def _hooked() -> nn.Module:
    model = nn.Sequential(C(2, 3, 1), B(3), C(3, 2, 1), B(2))
    model[0].register_forward_hook(lambda module, args, output: None)
    model[3].register_forward_pre_hook(lambda module, args: None)
    return model


def _patched() -> nn.Module:
    model = nn.Sequential(C(2, 3, 1), B(3))
    model[1].forward = model[1].forward  # type: ignore[method-assign]
    return model


def _tied() -> nn.Module:
    model = nn.Sequential(C(2, 2, 1), B(2), C(2, 2, 1), B(2))
    model[2].weight = model[0].weight
    return model


def _tied_gamma() -> nn.Module:
    model = nn.Sequential(C(2, 2, 1), B(2), C(2, 2, 1), nn.ReLU(), B(2))
    model[4].weight = model[1].weight
    return model


def _two_names() -> nn.Module:
    model = Net(lambda m, x: m.n(m.a(x)) + m.n(m.b(x)), a=C(2, 3, 1), b=C(2, 3, 1), n=B(3))
    model.other = nn.Sequential(model.a)  # type: ignore[arg-type]
    return model


def _memory() -> nn.Module:
    model = nn.Sequential(C(2, 2, 1), B(2), C(2, 2, 1), nn.ReLU()).double()  # so that it stays
    model[2].weight = nn.Parameter(model[0].weight.data)  # type: ignore[arg-type, union-attr]
    return model


def _spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(C(2, 3, 1)), B(3))


def _statistics() -> nn.Module:
    return Net(lambda m, x: m.n(m.a(x)) + m.n.running_mean.sum(), a=C(2, 3, 1), n=B(3))


def _trains_itself(m: Any, x: Tensor) -> Tensor:
    m.n.training = True
    y: Tensor = m.n(m.a(x))
    m.n.training = False
    return y


class OfTheUser(nn.BatchNorm2d):
    """A BatchNorm of a class of the user's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


LEFT: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "hooks": (_hooked, IMAGES, ["'0' has hooks", "it has hooks"]),
    "a forward of its own": (_patched, IMAGES, ["it has a forward of its own"]),
    "a tied weight": (_tied, IMAGES, ["weight is shared with"] * 2),
    "a tied gamma": (_tied_gamma, IMAGES, ["its parameters or statistics", "its parameters or"]),
    "shared memory": (_memory, IMAGES, ["weight: its memory is shared"]),
    "another class": (
        lambda: nn.Sequential(C(2, 3, 1), OfTheUser(3)), IMAGES, ["its class OfTheUser is not"]
    ),
    "two layers, one BatchNorm": (_two_names, IMAGES, ["it reads the results of a, b"]),
    "a module of two names": (
        lambda: Net(lambda m, x: m.n(m.a(x)), a=(a := C(2, 3, 1)), n=B(3), other=nn.Sequential(a)),
        IMAGES, ["'a' is the module 'other.0' too"],
    ),
    "parametrized": (_spectral, IMAGES, ["computes with something else than its weight"]),
    "statistics of the batch": (
        lambda: nn.Sequential(C(2, 3, 1), B(3, track_running_stats=False)), IMAGES,
        ["it keeps no running statistics"],
    ),
    "training itself": (
        lambda: Net(_trains_itself, a=C(2, 3, 1), n=B(3)), IMAGES, ["calls it in training mode"]
    ),
    "not called": (
        lambda: Net(lambda m, x: m.a(x), a=C(2, 3, 1), n=B(3)), IMAGES, ["it is not called"]
    ),
    "statistics that are read": (_statistics, IMAGES, ["parameters or statistics are read"]),
    "gamma that is read": (
        lambda: Net(lambda m, x: m.n(m.a(x)) * m.n.weight.sum(), a=C(2, 3, 1), n=B(3)), IMAGES,
        ["parameters or statistics are read"],
    ),
    "used before it is normalized": (
        lambda: Net(lambda m, x: (y := m.a(x)) + m.n(y), a=C(2, 3, 1), n=B(3)), IMAGES,
        ["what 'a' gives is used elsewhere"],
    ),
    "written before it is normalized": (
        lambda: Net(lambda m, x: m.n(m.a(x).add_(1)), a=C(2, 3, 1), n=B(3)), IMAGES,
        ["it reads the result of 'add'"],
    ),
    "an output too": (
        lambda: Net(lambda m, x: (m.n(y := m.a(x)), y), a=C(2, 3, 1), n=B(3)), IMAGES,
        ["what 'a' gives is used elsewhere"],
    ),
    "a layer that is called again": (
        lambda: Net(lambda m, x: m.n(m.a(x)) + m.a(x.relu()), a=C(2, 3, 1), n=B(3)), IMAGES,
        ["the weight of 'a' is read elsewhere"],
    ),
    "a BatchNorm that is called again": (
        lambda: Net(lambda m, x: m.n(m.a(x)) + m.n(x), a=C(2, 2, 1), n=B(2)), IMAGES,
        ["it reads an input"],
    ),
    "a weight that is read": (
        lambda: Net(lambda m, x: (m.n(m.a(x)), m.a.weight.sum()), a=C(2, 3, 1), n=B(3)), IMAGES,
        ["the weight of 'a' is read elsewhere"],
    ),
    "a weight that leaves": (
        lambda: Net(lambda m, x: (m.n(m.a(x)), m.a.weight), a=C(2, 3, 1), n=B(3)), IMAGES,
        ["the weight of 'a' leaves the model"],
    ),
    "something between": (
        lambda: nn.Sequential(C(2, 3, 1), nn.AvgPool2d(2), B(3)), IMAGES,
        ["it reads the result of 'avg_pool2d'"],
    ),
    "another axis": (
        lambda: nn.Sequential(L(6, 6), nn.BatchNorm1d(6)), numbers(2, 6, 6), ["another axis"]
    ),
    "no batch": (
        lambda: nn.Sequential(C(2, 6, 1), nn.BatchNorm1d(6)), numbers(2, 6, 6), ["another axis"]
    ),
    "a function of the parent's": (
        lambda: Net(lambda m, x: F.batch_norm(m.a(x), m.n.running_mean, m.n.running_var),
                    a=C(2, 3, 1), n=B(3)), IMAGES, ["it is not called"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_proved_is_left_alone_and_says_why(name: str) -> None:
    make, inputs, reasons = LEFT[name]
    model = trained(make())
    modules = dict(model.named_modules())
    before = outputs(model, inputs)
    old = {key: value.clone() for key, value in model.state_dict().items()}
    folding = fold_batchnorm_(model, inputs)
    assert all(sum(r in entry.reason for entry in folding.left) for r in reasons), str(folding)
    if not folding.folded:
        assert dict(model.named_modules()) == modules
        assert all(torch.equal(value, old[key]) for key, value in model.state_dict().items())
    assert relative_change(before, outputs(model, inputs)) < EXACT


def test_a_model_in_training_is_left_alone() -> None:
    model = nn.Sequential(C(2, 3, 1), B(3)).double()
    folding = fold_batchnorm_(model, IMAGES)
    assert not folding.folded
    assert str(folding).splitlines() == [
        "0 BatchNorm layers folded, 1 left alone",
        "  1 left alone: it is in training mode: call eval() first",
    ]
    assert isinstance(model[1], B)


def test_numbers_that_would_not_be_finite_stay() -> None:
    model = trained(nn.Sequential(C(2, 3, 1), B(3, eps=0.0), nn.ReLU(), C(3, 2, 1), B(2)))
    model[1].running_var.zero_()  # type: ignore[operator, union-attr]
    folding = fold_batchnorm_(model, IMAGES)
    assert [entry.batchnorm for entry in folding.folded] == ["4"]
    assert folding.left[0].reason == "the folded weights would not be finite"


def test_a_model_without_values_is_left_alone() -> None:
    with torch.device("meta"):
        model = nn.Sequential(C(2, 3, 1), B(3)).eval()
    folding = fold_batchnorm_(model, torch.zeros(1, 2, 4, 4, device="meta"))
    assert "it is on the meta device" in folding.left[0].reason


class UntilDataDecides(nn.Module):
    """Calls a BatchNorm again after the shape of a result depends on data."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.a, self.n = C(2, 3, 1), B(3)
        self.b, self.o = C(3, 3, 1), B(3, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        y = self.o(self.b(self.n(self.a(x)).relu())).relu()
        chosen = y[y.sum((1, 2, 3)) > 0]  # as many images as there happen to be
        result: Tensor = self.o(chosen).mean()
        return result


@pytest.mark.parametrize("affine", [True, False])
def test_what_may_be_called_after_the_trace_has_ended_stays(affine: bool) -> None:
    model = trained(UntilDataDecides(affine))
    before = outputs(model, IMAGES)
    folding = fold_batchnorm_(model, IMAGES)
    assert [entry.batchnorm for entry in folding.folded] == ["n"]
    assert [entry.module for entry in folding.left] == ["o"]
    assert len(folding.notes) == 1
    assert folding.notes[0] in str(folding)
    assert relative_change(before, outputs(model, IMAGES)) < EXACT


@pytest.mark.parametrize("skip", [True, False])
def test_by_the_graph_that_torch_exports(skip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trace has a run for training too, in which BatchNorm alone may be the difference."""
    monkeypatch.setattr(batchnorm, "trace", lambda model, inputs: trace(model, inputs, "export"))

    def run(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.n(m.a(x)).relu()
        return y if m.training and skip else m.o(m.b(y))

    model = trained(Net(run, a=C(2, 3, 1), n=B(3), b=C(3, 3, 1, bias=False), o=B(3)))
    before = outputs(model, IMAGES)
    assert len(fold_batchnorm_(model, IMAGES).folded) == 2
    assert relative_change(before, outputs(model, IMAGES)) < EXACT


# ---- all or nothing ----


class NoBias(nn.Conv2d):
    """A convolution that would not read a bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


def _listed() -> nn.Module:
    """The BatchNorm is called by another way than its name."""
    model = Net(lambda m, x: m.held[0](m.a(x)), a=C(2, 3, 1), n=B(3))
    model.held = [model.n]  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    "make",
    [
        _listed,
        lambda: Net(lambda m, x: m.n(m.a(x)) * m.n.eps, a=C(2, 3, 1, bias=False), n=B(3)),
        lambda: Net(lambda m, x: m.n(m.a(x)) + len([*m.parameters()]), a=C(2, 3, 1), n=B(3)),
        lambda: Net(lambda m, x: m.n(m.a(x)), a=NoBias(2, 3, 1, bias=False), n=B(3)),
        lambda: Net(
            lambda m, x: m.n(m.a(x)) * (2 if isinstance(m.n, B) else 3), a=C(2, 3, 1), n=B(3)
        ),
    ],
    ids=["another way", "eps", "counting", "no bias", "asking for the class"],
)
def test_a_model_that_reads_more_than_the_result_is_refused(make: Callable[[], nn.Module]) -> None:
    model = trained(make())
    modules = dict(model.named_modules())
    old = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(TraceError):
        fold_batchnorm_(model, IMAGES)
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == list(old)
    assert all(torch.equal(value, old[key]) for key, value in model.state_dict().items())


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"must be a torch\.nn\.Module, not int"):
        fold_batchnorm_(3)  # type: ignore[arg-type]
