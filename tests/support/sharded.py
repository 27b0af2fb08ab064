"""Training on several processes beside the same training on one: what differs in the end.

`python -m tests.support.sharded` is not meant for people: `run` starts processes of its own.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

import enorm_fx
from enorm_fx.model_plan import Plan

STEPS = 3


class Mixed(nn.Module):
    """Convolutions, a depthwise one, GroupNorm, flattened maps, a sum, layers of uneven sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.grouped = nn.Conv2d(6, 4, 1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.up = nn.Linear(4 * 9, 7)
        self.gate = nn.Linear(4 * 9, 7, bias=False)
        self.down = nn.Linear(7, 5)
        self.side = nn.Linear(7, 5, bias=False)  # beside down: their sums travel as one
        self.square = nn.Linear(5, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.first(x).relu()).relu()
        x = self.norm(self.grouped(x)).relu().flatten(1)
        x = (self.gate(x).relu() * self.up(x)).relu()
        x = (self.down(x) + self.side(x)).relu()
        return self.last((x + self.square(x)).relu())


class Perceptron(nn.Module):
    """Linear layers by name, which tensor parallelism cuts by columns and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)
        self.c, self.d = nn.Linear(6, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())


_STYLES: dict[str, ParallelStyle] = {
    "a": ColwiseParallel(), "b": RowwiseParallel(), "c": ColwiseParallel(), "d": RowwiseParallel()
}  # fmt: skip


def _fsdp(model: nn.Module, mesh: DeviceMesh) -> None:
    for layer in model.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(model, mesh, _STYLES)


def _replicated_and_sharded(model: nn.Module, mesh: DeviceMesh) -> None:
    _fsdp(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts")))


def _both(model: nn.Module, mesh: DeviceMesh) -> None:
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, square["tensor"], _STYLES)
    fully_shard(model, mesh=square["data"])


SPREADS: dict[str, tuple[int, type[nn.Module], Callable[[nn.Module, DeviceMesh], None]]] = {
    "fully_shard, 2 processes": (2, Mixed, _fsdp),
    "tensor parallel, 2 processes": (2, Perceptron, _tensor_parallel),
    "fully_shard, 4 processes": (4, Mixed, _fsdp),
    "hybrid, 4 processes": (4, Mixed, _replicated_and_sharded),
    "fully_shard of tensor parallel, 4 processes": (4, Perceptron, _both),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "colored": {"order": "colored", "cycles": 2, "start": "as_is"},
    "simultaneous, p = 1": {"order": "simultaneous", "p": 1.0, "c": 1.2},
    "alternating": {"order": "alternating"},
    "p = inf": {"p": float("inf"), "start": "as_is"},  # `balanced` goes to the optimum
    "to the optimum": {"converge": True},
    "exact": {"exact": True, "start": "as_is"},  # in parts nothing is rounded to the optimum
}


def _inputs(kind: type[nn.Module], dtype: torch.dtype) -> Tensor:
    shape = (4, 3, 3, 3) if kind is Mixed else (4, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def _train(
    model: nn.Module, plan: Plan, x: Tensor, settings: dict[str, Any], whole: bool
) -> list[Tensor]:
    """All parameters and buffers of the optimizer after some steps; float32: ENorm's alone."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True, foreach=False)
    enorm = enorm_fx.ENorm(plan, optimizer, **settings)
    for _ in range(STEPS):
        if x.dtype == torch.float64:  # where rounding in the training itself does not matter
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        enorm.step()
    assert whole or "converge" in settings or enorm.backend == "distributed", enorm.backend
    held = [t for p in model.parameters() for t in (p, *optimizer.state[p].values())]
    return [_full(t).detach() for t in held]


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _made(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return kind().to(dtype)


def difference(spread: str, setting: str, dtype: torch.dtype) -> float:
    """The largest relative difference of a tensor from what training on one process gives."""
    _, kind, apply = SPREADS[spread]
    x = _inputs(kind, dtype)
    one, many = _made(kind, dtype), _made(kind, dtype)
    plans = [enorm_fx.analyze(model, x) for model in (one, many)]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    apply(many, mesh)
    expected = _train(one, plans[0], x, SETTINGS[setting], whole=True)
    found = _train(many, plans[1], x, SETTINGS[setting], whole=False)
    _equal_in_all_processes(found)
    return max(
        float((a - b).norm() / b.norm().clamp(min=1e-300))
        for a, b in zip(found, expected, strict=True)
    )


def _equal_in_all_processes(tensors: list[Tensor]) -> None:
    flat = torch.cat([tensor.double().reshape(-1) for tensor in tensors])
    most, least = flat.clone(), flat.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    assert torch.equal(most, least), "the processes hold different numbers"


def _perceptron(apply: Callable[[nn.Module, DeviceMesh], None]) -> tuple[nn.Module, Plan]:
    model = _made(Perceptron, torch.float64)
    plan = enorm_fx.analyze(model, _inputs(Perceptron, torch.float64))
    apply(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, plan


def _held(model: nn.Module) -> list[Tensor]:
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach().clone() for p in parts if p.untyped_storage().nbytes()]


def refusal(change: Callable[[nn.Module], None]) -> str:
    """What this process is told after one of them changed something; '' if nothing was refused."""
    x = _inputs(Mixed, torch.float64)
    model = _made(Mixed, torch.float64)
    plan = enorm_fx.analyze(model, x)
    for name in ("up", "gate"):  # the other layers are plain: each process has all of them
        fully_shard(
            model.get_submodule(name), mesh=init_device_mesh("cpu", (dist.get_world_size(),))
        )
    enorm = enorm_fx.ENorm(plan)
    with torch.no_grad():
        change(model)
    before = _held(model)
    try:
        enorm.step()
    except enorm_fx.EnormError as error:
        after = zip(_held(model), before, strict=True)
        if all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in after):
            return f"{type(error).__name__}: {error}"
        return "something was written"
    return ""


def _part(model: nn.Module, name: str) -> Tensor:
    held: Any = model.get_parameter(name)
    part: Tensor = held.to_local()
    return part


def _nan_in_one_part(model: nn.Module) -> None:
    if dist.get_rank() == 1:
        _part(model, "up.weight")[0, 0] = float("nan")


def _unsynchronised(model: nn.Module) -> None:
    if dist.get_rank() == 1:
        model.get_parameter("down.weight").mul_(1.5)


def _freed(model: nn.Module) -> None:
    if dist.get_rank() == 1:
        _part(model, "up.weight").untyped_storage().resize_(0)


def _nothing(model: nn.Module) -> None:
    pass


REFUSALS: dict[str, Callable[[nn.Module], None]] = {
    "nothing": _nothing,
    "NaN in one part": _nan_in_one_part,
    "replicated weight changed in one process": _unsynchronised,
    "storage freed in one process": _freed,
}


def data_parallel() -> str:
    """Whether ranks of DistributedDataParallel hold the same bits after steps on their own data."""
    model = _made(Mixed, torch.float32)
    x = _inputs(Mixed, torch.float32)
    plan = enorm_fx.analyze(model, x)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    enorm = enorm_fx.ENorm(plan, optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        wrapped(x + dist.get_rank()).square().mean().backward()
        optimizer.step()
        enorm.step()
    _equal_in_all_processes([p.detach() for p in model.parameters()])
    return "the same bits"


def survivor(model: nn.Module, enorm: enorm_fx.ENorm) -> str:
    """What a step says once the other process is gone."""
    before = _held(model)
    try:
        enorm.step()
    except RuntimeError as error:
        same = all(torch.equal(a, b) for a, b in zip(_held(model), before, strict=True))
        return type(error).__name__ if same else "something was written"
    return "it made the step"


def after_evaluation() -> str:
    """Whether a step after an evaluation, which leaves gathered weights, reaches the parts."""
    model, plan = _perceptron(_fsdp)
    enorm = enorm_fx.ENorm(plan)
    with torch.no_grad():
        outputs = model(_inputs(Perceptron, torch.float64))
    before = _held(model)
    enorm.step()
    moved = any(not torch.equal(a, b) for a, b in zip(_held(model), before, strict=True))
    with torch.no_grad():
        change = float((model(_inputs(Perceptron, torch.float64)) - outputs).abs().max())
    return "as it should" if moved and change < 1e-12 else f"moved: {moved}, change {change}"


def balanced() -> float:
    """balance, norm and rescale_ on parts: the largest difference from the same on one process."""
    x = _inputs(Mixed, torch.float64)
    one, many = _made(Mixed, torch.float64), _made(Mixed, torch.float64)
    plans = [enorm_fx.analyze(model, x) for model in (one, many)]
    _fsdp(many, init_device_mesh("cpu", (dist.get_world_size(),)))
    scales = torch.randn(plans[0].num_scales, generator=torch.Generator().manual_seed(3)).double()
    for plan in plans:
        plan.rescale_(scales)
    gaps = [abs(plans[0].norm() / plans[1].norm() - 1)]
    for p in (2, float("inf")):
        reports = [enorm_fx.balance(plan, p=p) for plan in plans]
        gaps.append(abs(reports[0].norm_after / reports[1].norm_after - 1))
        pairs = zip(one.parameters(), many.parameters(), strict=True)
        gaps += [float(((_full(b) - a).norm() / a.norm()).detach()) for a, b in pairs]
    return max(gaps)


def _all(size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}

    def note(name: str, run: Callable[[], Any]) -> None:
        try:
            results[name] = run()
        except Exception:  # whatever it is, the test shows it
            results[name] = traceback.format_exc()

    for name, spread, setting, dtype in cases(size):
        note(name, partial(difference, spread, setting, dtype))
    if size == 2:
        for name, change in REFUSALS.items():
            note(name, partial(refusal, change))
        note("after an evaluation", after_evaluation)
        note("balance", balanced)
        note("data parallel", data_parallel)
    return results


def cases(size: int) -> list[tuple[str, str, str, torch.dtype]]:
    """Name, spread, setting and type of what is trained on that many processes."""
    settings = list(SETTINGS) if size == 2 else ["colored"]
    return [
        (f"{spread}, {setting}, {dtype}", spread, setting, dtype)
        for spread, (world, *_) in SPREADS.items()
        if world == size
        for setting in settings
        for dtype in (torch.float64, torch.float32)
        if dtype == torch.float64 or setting in ("sequential", "colored")
    ]


def _process(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
    )
    results = _all(size)
    if size == 2:
        file = Path(folder, f"{rank}.json")
        file.write_text(json.dumps(results))
        model, plan = _perceptron(_fsdp)
        enorm = enorm_fx.ENorm(plan)
        dist.barrier()
        if rank == 1:
            os._exit(0)
        results["the other process is gone"] = survivor(model, enorm)
        file.write_text(json.dumps(results))
        os._exit(0)  # no orderly end without the other
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def run(size: int, folder: Path) -> list[dict[str, Any]]:
    """What every process of a group of that size has found."""
    torch.multiprocessing.spawn(_process, (size, str(folder)), nprocs=size)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for rank, results in enumerate(run(int(sys.argv[1]), Path(folder))):
            for name, result in results.items():
                print(rank, name, result)
