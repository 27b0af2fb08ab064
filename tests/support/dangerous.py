"""Memory that must not be touched: `python -m tests.support.dangerous` tries every case.

Each case runs in a process of its own, forked from one that has imported torch and done nothing
with it, so that a crash ends one case. Prints a line of JSON by case: the signal or status that
ended it, and the error that was raised.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import enorm_fx
from enorm_fx.errors import EnormError
from enorm_fx.step.backends import BACKENDS

Run = Callable[[nn.Module, torch.optim.Optimizer, Callable[[], None]], None]
CASES: dict[str, Run] = {}


def case(function: Run) -> Run:
    """A case makes memory dangerous; the step that is passed to it must refuse afterwards."""
    CASES[function.__name__] = function
    return function


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as DTensor and quantized weights are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(str(func))


@case
def freed(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
    weight = model.get_parameter("2.weight")
    weight.untyped_storage().resize_(0)
    step()


@case
def shrunk(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
    weight = model.get_parameter("2.weight")
    weight.untyped_storage().resize_(weight.untyped_storage().nbytes() // 2)
    step()


@case
def buffer_freed(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None]
) -> None:
    state = optimizer.state[model.get_parameter("2.weight")]
    state["momentum_buffer"].untyped_storage().resize_(0)
    step()


@case
def smaller(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
    with torch.no_grad():
        model.get_parameter("2.weight").set_(torch.zeros(2, 2))
    step()


@case
def subclass(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
    layer = model.get_submodule("2")
    layer.weight = nn.Parameter(Wrapper(layer.weight.detach()))
    step()


@case
def swapped(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
    """The same object becomes a tensor of another kind."""
    optimizer.state.clear()
    weight = model.get_parameter("2.weight")
    weight.grad = None
    torch.utils.swap_tensors(weight, nn.Parameter(Wrapper(torch.zeros(weight.shape))))
    step()


@case
def sparse(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
    layer = model.get_submodule("2")
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse())
    step()


@case
def fake(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
    from torch._subclasses import FakeTensorMode

    layer = model.get_submodule("2")
    layer.weight = nn.Parameter(FakeTensorMode().from_tensor(layer.weight.detach()))
    step()


@case
def expanded(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
    layer = model.get_submodule("2")
    layer.weight = nn.Parameter(torch.ones(1, 1).expand(layer.weight.shape))
    step()


@case
def sharded(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
    """fully_shard on two processes: parameters become DTensors that hold half of their rows."""
    from torch.distributed.fsdp import fully_shard

    meeting = Path(tempfile.mkdtemp()) / "meeting"
    other = os.fork()
    rank = int(other == 0)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh)
    try:
        step()
    finally:
        torch.distributed.destroy_process_group()
        if rank:
            os._exit(0)
        os.waitpid(other, 0)


def attempt(name: str, backend: str, late: bool) -> str:
    """The error of one case. late: the step has run before, and so is compiled already."""
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(8, 8), nn.ReLU())))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    plan = enorm_fx.analyze(model, torch.zeros(1, 8))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    if backend == "rescale_":
        u = torch.ones(plan.num_scales)

        def step() -> None:
            plan.rescale_(u, optimizer)

    elif backend == "balance":

        def step() -> None:
            enorm_fx.balance(plan)

    else:
        enorm = (
            enorm_fx.ENorm(plan, optimizer, backend=backend, last_layer=True, start="as_is")
            if late
            else None
        )
        if enorm is not None:
            enorm.step()
            before = {n: p.detach().clone() for n, p in model.named_parameters()}

        def step() -> None:
            (
                enorm
                or enorm_fx.ENorm(plan, optimizer, backend=backend, last_layer=True, start="as_is")
            ).step()

    try:
        CASES[name](model, optimizer, step)
    except EnormError as error:
        touched = [n for n in ("0.weight", "4.weight") if _changed(model, n, before[n])]
        return f"{type(error).__name__}: {error}" + f" TOUCHED {touched}" * bool(touched)
    return "nothing was raised"


def _changed(model: nn.Module, name: str, before: Tensor) -> bool:
    now = model.get_parameter(name)
    return type(now) is nn.Parameter and not torch.equal(now, before)


def ways() -> list[tuple[str, bool]]:
    """(how a step is made, late): every backend that this machine has, early and late."""
    stepping = [b for b in BACKENDS if b in ("native", "eager")]
    return [(b, late) for b in stepping for late in (False, True)] + [
        ("rescale_", False),
        ("balance", False),
    ]


def main() -> int:
    """Fork for each case and way; print what became of it."""
    # One thread, so that there is none that a fork would lose; what all need is imported here.
    torch.set_num_threads(1)

    attempt("smaller", "native", True)
    for name in CASES:
        for backend, late in ways():
            reading, writing = os.pipe()
            child = os.fork()
            if not child:
                os.write(writing, attempt(name, backend, late).encode())
                os._exit(0)
            os.close(writing)
            with os.fdopen(reading) as pipe:
                told = pipe.read()
            _, status = os.waitpid(child, 0)
            row = {"case": name, "way": backend, "late": late, "status": status, "told": told}
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
