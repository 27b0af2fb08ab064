"""A guard that asks native code where tensors lie sees what one that asks torch's methods sees."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enorm_fx import ENorm
from enorm_fx.step.guard import Guard
from enorm_fx.step.native import places
from enorm_fx.step.native.pack import Unsupported
from enorm_fx.step.native.places import Places, places_of
from tests.support.helpers import BACKENDS, largest_error, weights

HERE = places_of([torch.zeros(2)]) is not None
WAYS = [False, *([True] if HERE else [])]
native = pytest.mark.skipif(not HERE, reason="no compiler, or a torch without DLPack's interface")


def made() -> tuple[nn.Sequential, torch.optim.SGD]:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(3, 4)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def guarded(model: nn.Module, optimizer: torch.optim.Optimizer, natively: bool) -> Guard:
    names = [name for name, _ in model.named_parameters()]
    return Guard(model, names, {optimizer: ["momentum_buffer"]}, natively)


Change = Callable[[Any, torch.optim.Optimizer], None]
CHANGES: dict[str, Change] = {}
REST: dict[str, Change] = {}


def change(function: Change) -> Change:
    """Something that a guard must see."""
    CHANGES[function.__name__] = function
    return function


def rest(function: Change) -> Change:
    """Something that it must pass over: compiling anew takes a thousand steps' time."""
    REST[function.__name__] = function
    return function


def at(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    return optimizer.state[parameter]


@change
def data_replaced(model: Any, optimizer: Any) -> None:
    model[2].weight.data = model[2].weight.data.clone()


@change
def data_transposed(model: Any, optimizer: Any) -> None:
    model[2].weight.data = model[2].weight.data.t()


@change
def data_viewed(model: Any, optimizer: Any) -> None:
    model[2].weight.data = model[2].weight.data.view(2, 8)


@change
def data_narrowed(model: Any, optimizer: Any) -> None:
    model[2].weight.data = model[2].weight.data[:2]


@change
def data_moved_on(model: Any, optimizer: Any) -> None:
    memory = model[2].bias.data
    model[2].bias.data = torch.as_strided(memory, (3,), (1,), 1)


@change
def bits_taken_for_others(model: Any, optimizer: Any) -> None:
    state = at(optimizer, model[2].weight)
    state["momentum_buffer"].data = state["momentum_buffer"].data.view(torch.int32)


@change
def cast(model: Any, optimizer: Any) -> None:
    model[2].weight.data = model[2].weight.data.double()


@change
def on_another_device(model: Any, optimizer: Any) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().to("meta"))


@change
def set_to_another(model: Any, optimizer: Any) -> None:
    with torch.no_grad():
        model[2].weight.set_(torch.zeros(2, 2))


@change
def freed(model: Any, optimizer: Any) -> None:
    model[2].weight.untyped_storage().resize_(0)


@change
def freed_and_back(model: Any, optimizer: Any) -> None:
    storage = model[2].weight.untyped_storage()
    size, kept = storage.nbytes(), []
    before = storage.data_ptr()
    storage.resize_(0)
    while True:  # where it was, somebody else is now
        kept.append(torch.empty(4, 4))
        storage.resize_(size)
        if storage.data_ptr() != before:
            return
        storage.resize_(0)


@change
def shrunk(model: Any, optimizer: Any) -> None:
    storage = at(optimizer, model[2].weight)["momentum_buffer"].untyped_storage()
    storage.resize_(storage.nbytes() // 2)


@change
def shrunk_at_its_place(model: Any, optimizer: Any) -> None:
    storage = model[2].weight.untyped_storage()
    size, place = storage.nbytes(), storage.data_ptr()
    for _ in range(50):
        storage.resize_(0)
        storage.resize_(size - 4)  # an allocator gives out what was freed last
        if storage.data_ptr() == place:
            return


@change
def swapped_for_the_transposed(model: Any, optimizer: Any) -> None:
    weight = model[2].weight
    optimizer.state.clear()
    weight.grad = None
    gc.collect()
    torch.utils.swap_tensors(weight, nn.Parameter(weight.data.t()))


@change
def another_parameter(model: Any, optimizer: Any) -> None:
    model[2].weight = nn.Parameter(model[2].weight.data)


@change
def frozen(model: Any, optimizer: Any) -> None:
    model[2].weight.requires_grad_(False)


@change
def another_module(model: Any, optimizer: Any) -> None:
    model[3] = nn.ReLU()


@change
def a_module_more(model: Any, optimizer: Any) -> None:
    model[3].add_module("inner", nn.ReLU())


@change
def a_parameter_more(model: Any, optimizer: Any) -> None:
    model[3].register_parameter("gain", nn.Parameter(torch.ones(1)))


@change
def a_parameter_of_another_name(model: Any, optimizer: Any) -> None:
    model[2].register_parameter("gain", model[2]._parameters.pop("bias"))


@change
def another_buffer(model: Any, optimizer: Any) -> None:
    state = at(optimizer, model[2].weight)
    state["momentum_buffer"] = state["momentum_buffer"].clone()


@change
def a_buffer_more(model: Any, optimizer: Any) -> None:
    at(optimizer, model[2].weight)["average"] = torch.zeros(4, 4)


@change
def a_buffer_less(model: Any, optimizer: Any) -> None:
    del at(optimizer, model[2].weight)["momentum_buffer"]


@change
def another_state(model: Any, optimizer: Any) -> None:
    optimizer.state[model[2].weight] = dict(at(optimizer, model[2].weight))


@change
def no_state(model: Any, optimizer: Any) -> None:
    optimizer.state.clear()


@rest
def nothing(model: Any, optimizer: Any) -> None:
    pass


@rest
def a_step(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.randn(3, 4)).square().mean().backward()
    optimizer.step()


@rest
def written_in_place(model: Any, optimizer: Any) -> None:
    with torch.no_grad():
        model[2].weight.mul_(2)
        model[2].weight.data = model[2].weight.data
    model.eval()


@pytest.mark.parametrize("natively", WAYS)
@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen(name: str, natively: bool) -> None:
    model, optimizer = made()
    guard = guarded(model, optimizer, natively)
    assert guard.holds()
    CHANGES[name](model, optimizer)
    assert not guard.holds()


@pytest.mark.parametrize("natively", WAYS)
@pytest.mark.parametrize("name", REST)
def test_the_rest_is_passed_over(name: str, natively: bool) -> None:
    model, optimizer = made()
    guard = guarded(model, optimizer, natively)
    for context in (torch.enable_grad, torch.inference_mode, lambda: torch.autocast("cpu")):
        with context():
            assert guard.holds()
    REST[name](model, optimizer)
    assert guard.holds()


# ---- what native code is told ----


def some() -> list[Tensor]:
    return [
        torch.randn(3, 4),
        nn.Parameter(torch.randn(4, 3, dtype=torch.float64).t()),
        torch.randn(9)[2:8].view(2, 3),
        torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last),
        torch.tensor(1.0),
        torch.zeros(0, 4),
        torch.zeros(5, dtype=torch.float16),
    ]


@native
def test_tensors_that_are_alike_but_for_their_addresses_are_told_from_others() -> None:
    tensors = some()
    where = Places(tensors)
    assert where.hold()
    others = [torch.empty_like(t) for t in tensors]
    others[1], others[2] = others[1].detach(), torch.randn(9)[1:7].view(2, 3)
    assert where.of_alike(others) == [t.data_ptr() for t in others]
    assert where.of_alike(others[1:]) is None
    for number, tensor in enumerate(others):
        wrong: list[Any] = [tensor.to(torch.int8), torch.zeros(7, 7), torch.zeros(3).to_sparse()]
        for one in [*wrong, None, torch.empty(tensor.shape, device="meta")]:
            assert where.of_alike([*others[:number], one, *others[number + 1 :]]) is None
    transposed = others[0].t().contiguous().t()
    assert where.of_alike([transposed, *others[1:]]) is None


@native
def test_what_dlpack_does_not_know_is_left_to_torch() -> None:
    with pytest.raises(Unsupported, match="DLPack does not know"):
        Places([torch.zeros(2, device="meta")])
    assert places_of([torch.zeros(2).to_sparse()]) is None


@pytest.mark.parametrize("missing", ["interface", "library"])
@pytest.mark.parametrize("fused", [False, True])
def test_without_it_steps_are_the_same(
    missing: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for there in (True, False):
        torch.manual_seed(0)
        if not there:
            monkeypatch.setattr(places, "_interface", _unsupported)
            if missing == "library":
                monkeypatch.setattr(places, "_library", _unsupported)
        model, optimizer = made()
        enorm = ENorm(model, optimizer, backend=BACKENDS[-1], start="as_is", fused=fused)
        enorm.attach()
        for _ in range(3):
            CHANGES["data_replaced"](model, optimizer)
            REST["a_step"](model, optimizer)
        assert enorm.backend == BACKENDS[-1]
        ends.append(weights(model))
    assert largest_error(ends[0], ends[1]) == 0


def _unsupported() -> None:
    raise Unsupported("there is none")
