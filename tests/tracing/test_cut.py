"""Models whose path begins to depend on data: what may be read from there on stays as it is.

Every model here computes z = d(relu(c(relu(a(x))))), then a result whose shape depends on data;
afterwards it reads layer a again, each in another way. So a's side must stay, and the four scales
between c and d are free.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enorm_fx import analyze
from enorm_fx.errors import TraceError
from tests.support.laws import ROUNDING, largest_change, randomized

ROWS = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
GLOBAL: dict[str, nn.Module] = {}


class Base(nn.Module):
    """The part before the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.d = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.names = ["a"]
        self.holder = SimpleNamespace(layer=None)

    def start(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.a(x).relu()).relu())

    def again(self, x: Tensor) -> Tensor:
        return self.a(x)

    @property
    def first(self) -> nn.Module:
        return self._modules["a"]


def picked(x: Tensor) -> Tensor:
    return (x[:, 0] > 0).nonzero()[:, 0]


def read_a(model: Base, x: Tensor) -> Tensor:
    return model.a(x)


def read_global(x: Tensor) -> Tensor:
    return GLOBAL["model"].a(x)


FUNCTIONS = [read_global]


class Nothing(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x)
        return z[picked(x)]


class Plain(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x)
        return z[picked(x)].sum() + self.a(x).sum()


class OtherName(Base):
    def forward(this, x: Tensor) -> Tensor:
        z = this.start(x)
        return z[picked(x)].sum() + this.again(x).sum()


class Method(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x)
        return z[picked(x)].sum() + self.again(x).sum()


class Property(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x)
        return z[picked(x)].sum() + self.first(x).sum()


class Dynamic(Base):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__("a" if name == "alias" else name)

    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x)
        return z[picked(x)].sum() + self.alias(x).sum()


class ByName(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x)
        y = z[picked(x)].sum()
        for name in self.names:
            y = y + getattr(self, name)(x).sum()
        return y


class LocalVariable(Base):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.a
        z = self.start(x)
        return z[picked(x)].sum() + layer(x).sum()


class Lambda(Base):
    def forward(self, x: Tensor) -> Tensor:
        late = lambda t: self.a(t)  # noqa: E731
        z = self.start(x)
        return z[picked(x)].sum() + late(x).sum()


class Closure(Base):
    def forward(self, x: Tensor) -> Tensor:
        def late(t: Tensor) -> Tensor:
            return self.a(t)

        z = self.start(x)
        return z[picked(x)].sum() + late(x).sum()


class BoundMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        late = self.a.forward
        z = self.start(x)
        return z[picked(x)].sum() + late(x).sum()


class ForwardOfALayer(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x)
        return z[picked(x)].sum() + self.a.forward(x).sum()


class Partial(Base):
    def forward(self, x: Tensor) -> Tensor:
        late = functools.partial(read_a, self)
        z = self.start(x)
        return z[picked(x)].sum() + late(x).sum()


class Helper(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x)
        return z[picked(x)].sum() + read_a(self, x).sum()


class GlobalHelper(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x)
        return z[picked(x)].sum() + read_global(x).sum()


class ListOfHelpers(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x)
        return z[picked(x)].sum() + FUNCTIONS[0](x).sum()


class Holder(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x)
        return z[picked(x)].sum() + self.holder.layer(x).sum()


class Slot:
    __slots__ = ("layer",)

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Slots(Base):
    def forward(self, x: Tensor) -> Tensor:
        late = Slot(self.a)
        z = self.start(x)
        return z[picked(x)].sum() + late(x).sum()


class Loop(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = x.sum()
        for layer in (self.start, self.a):
            y = y + layer(x)[picked(x)].sum()
        return y


class SameStatement(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x)
        return sum([z[picked(x)].sum(), self.a(x).sum()])  # type: ignore[return-value]


class Caller(nn.Module):
    """What comes after the cut stands in the function that called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Nothing()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x).sum()
        return y + self.inner.a(x).sum()


class Weight(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x)
        y = z[picked(x)].sum()
        return y + torch.nn.functional.linear(x, self.a.weight, self.a.bias).sum()


READ_AGAIN = [
    Plain, OtherName, Method, Property, Dynamic, ByName, LocalVariable, Lambda, Closure,
    BoundMethod, ForwardOfALayer, Partial, Helper, GlobalHelper, ListOfHelpers, Holder, Slots, Loop,
    SameStatement, Caller, Weight,
]  # fmt: skip


def built(kind: Callable[[], nn.Module]) -> nn.Module:
    model = randomized(kind())
    base = model.inner if isinstance(model, Caller) else model
    base.holder = SimpleNamespace(layer=base.a)  # type: ignore[assignment]
    GLOBAL["model"] = model
    return model


@pytest.mark.parametrize("kind", READ_AGAIN, ids=lambda kind: kind.__name__)
def test_what_is_read_after_the_cut_stays(kind: Callable[[], nn.Module]) -> None:
    model = built(kind)
    plan = analyze(model, ROWS)
    moved = {p.name.rpartition("a.")[1] for p in plan.parameters if p.terms}
    assert "a." not in moved
    assert largest_change(plan, (ROWS,)) < ROUNDING
    assert plan.num_scales in (0, 4)  # 0 where the whole model may be read
    assert plan.notes


def test_what_comes_before_the_cut_is_free() -> None:
    plan = analyze(built(Nothing), ROWS)
    assert plan.num_scales == 8
    assert largest_change(plan, (ROWS,)) < ROUNDING
    assert "nonzero" in plan.notes[0]
    assert "test_cut.py" in plan.notes[0]


@pytest.mark.parametrize("kind", [Plain, Method, LocalVariable, Holder, Caller, Weight])
def test_only_what_is_read_again_stays(kind: Callable[[], nn.Module]) -> None:
    assert analyze(built(kind), ROWS).num_scales == 4


class Iterating(Base):
    def forward(self, x: Tensor) -> Tensor:
        layers = iter([self.a])
        z = self.start(x)
        return z[picked(x)].sum() + next(layers)(x).sum()


class Generating(Base):
    def forward(self, x: Tensor) -> Tensor:
        layers: Iterator[nn.Module] = (layer for layer in [self.a])
        z = self.start(x)
        return z[picked(x)].sum() + next(layers)(x).sum()


class Globals(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x)
        return z[picked(x)].sum() + globals()["GLOBAL"]["model"].a(x).sum()


@pytest.mark.parametrize("kind", [Iterating, Generating, Globals])
def test_what_the_source_does_not_tell_is_refused(kind: Callable[[], nn.Module]) -> None:
    with pytest.raises(TraceError, match="nonzero"):
        analyze(built(kind), ROWS)


def test_hooks_that_run_later_are_refused() -> None:
    model = built(Plain)
    model.a.register_forward_hook(lambda module, args, y: y + model.c.weight.sum())
    with pytest.raises(TraceError, match="hooks"):
        analyze(model, ROWS)


def test_code_without_a_source_is_refused() -> None:
    names: dict[str, Any] = {"Base": Base, "picked": picked}
    exec(  # as in an interactive session
        "class Typed(Base):\n"
        "    def forward(self, x):\n"
        "        z = self.start(x)\n"
        "        return z[picked(x)].sum() + self.a(x).sum()\n",
        names,
    )
    with pytest.raises(TraceError, match="source"):
        analyze(built(names["Typed"]), ROWS)
