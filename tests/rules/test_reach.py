"""Which entries of the parameters reach an output: never fewer than numbers show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enorm_fx import analyze
from enorm_fx.nested import tensors_anywhere
from enorm_fx.rules import reach
from enorm_fx.rules.boxes import Box, box
from enorm_fx.rules.reach import reached
from enorm_fx.tracing import trace
from tests.support.dags import Replay, seeded_recipe, tensors_for
from tests.support.laws import randomized, redrawn
from tests.support.zoo_kit import Net
from tests.support.zoo_small import ZOO, Small, zoo_reach

PARTIAL = [
    small
    for small in ZOO
    if isinstance(small.model, Net) and small.model.run.__module__ == zoo_reach.__name__
]


def seen(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Entries with a derivative at some of several random points."""
    found = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(16):
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(redrawn(p, generator))
        outputs = tensors_anywhere(model(*(redrawn(x, generator) for x in inputs)))
        loss = sum(y.square().sum() for y in outputs if y.requires_grad)
        if isinstance(loss, Tensor):
            model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        for name, p in model.named_parameters():
            if p.grad is not None:
                found[name] |= p.grad != 0
    return found


def inside(own: Box | None, shape: torch.Size) -> Tensor:
    """The entries of a box; none for no box."""
    result = torch.full(shape, own is not None)
    for axis, places in enumerate(own.axes if own is not None else ()):
        if places is not None:
            result &= places.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return result


def missing(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[str]:
    """Parameters with an entry that has a derivative and is in no box."""
    boxes = reached(trace(model, inputs, "symbolic"))
    return [
        name
        for name, mask in seen(model, inputs).items()
        if bool((mask & ~inside(boxes.get(name), mask.shape)).any())
    ]


@pytest.mark.parametrize("small", ZOO, ids=lambda small: small.name)
def test_nothing_that_reaches_an_output_is_left_out(small: Small) -> None:
    assert missing(randomized(small.build()), small.inputs()) == []


def test_nothing_that_reaches_an_output_of_a_random_graph_is_left_out() -> None:
    """Those apart that write into what has been read: torch refuses to differentiate them."""
    compared = 0
    for seed in range(120):
        recipe = seeded_recipe(seed)
        try:
            assert missing(Replay(recipe), tensors_for(recipe)) == [], recipe
            compared += 1
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
    assert compared > 100


@pytest.mark.parametrize("small", PARTIAL, ids=lambda small: small.name)
def test_what_reaches_none_is_left_out(small: Small) -> None:
    model, inputs = randomized(small.build()), small.inputs()
    boxes = reached(trace(model, inputs, "symbolic"))
    for name, mask in seen(model, inputs).items():
        assert torch.equal(inside(boxes.get(name), mask.shape), mask), name


@pytest.mark.parametrize("small", PARTIAL, ids=lambda small: small.name)
def test_both_front_ends_count_the_same(small: Small) -> None:
    model, inputs = randomized(small.build()), small.inputs()
    counts = {
        analyze(model, inputs, batchnorm="affine", tracer=tracer).num_scales
        for tracer in ("symbolic", "export")
    }
    assert len(counts) == 1


def _turned(z: Tensor) -> Tensor:
    z.t_()
    z[:, 1:] = 1
    return z


def _longer(z: Tensor) -> Tensor:
    z.unsqueeze_(0)
    z[0, :, 1:] = 1
    return z[0]


@pytest.mark.parametrize("tracer", ["symbolic", "export"])
@pytest.mark.parametrize(("shape", "change"), [((4, 6), _turned), ((6, 4), _longer)])
def test_zeros_of_another_shape_since_may_be_filled_anywhere(
    shape: tuple[int, int], change: Any, tracer: str
) -> None:
    def run(m: Any, x: Tensor) -> Any:
        return m.b(m.a(x).relu() * change(torch.zeros(shape, dtype=x.dtype)))

    model, x = (
        randomized(Net(run, a=nn.Linear(3, 4), b=nn.Linear(4, 2))),
        torch.randn(6, 3).double(),
    )
    boxes = reached(trace(model, x, tracer))
    assert boxes["a.weight"].whole
    assert boxes["b.weight"].whole


def test_an_entry_that_is_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the first slice of every weight left out, the comparison above would tell."""
    small = ZOO[0]

    def careless(call: reach.Read) -> dict[str, Box]:
        first = torch.arange(call.shape_of("weight")[0]) > 0
        return {"weight": box((first, None))}

    monkeypatch.setitem(reach.READERS, "linear", careless)
    monkeypatch.setattr(reach._Backwards, "_meets_zeros", lambda self, node: True)
    assert missing(randomized(small.build()), small.inputs())


def test_boxes_join_and_meet() -> None:
    first, last = torch.tensor([True, False, False]), torch.tensor([False, False, True])
    a, b = box((first, None)), box((last, None))
    assert (a | b).axes[0].tolist() == [True, False, True]  # type: ignore[union-attr]
    assert (a & b).empty
    assert ((a & b) | a).axes[0].tolist() == first.tolist()  # type: ignore[union-attr]
    assert (a | box((~first, None))).whole
