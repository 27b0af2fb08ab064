"""Fused steps by the kernel for a GPU: on one where there is one, else in triton's interpreter."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

import enorm_fx
from enorm_fx.enorm import ENorm
from enorm_fx.errors import ArgumentError, NonFiniteError
from enorm_fx.step import backends
from enorm_fx.step.fused import triton_step
from enorm_fx.step.fused.triton_step import TritonFused
from enorm_fx.step.generated.multiply import LineFactors
from tests.support.fused_runs import (
    OPTIMIZERS,
    case_of,
    difference,
    everything,
    read_by_a_step,
    train,
    trained,
    waiting,
)
from tests.support.helpers import KINDS, make, same_bits, weights
from tests.support.plans import Case

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the CPU, kernels are interpreted
ORDERS = ("sequential", "alternating", "colored")
PAIRS = list(zip(KINDS, itertools.cycle(OPTIMIZERS), itertools.cycle(ORDERS)))


@pytest.fixture(autouse=True)
def _nothing_warned() -> Iterator[None]:
    """A step that falls back says so anew in each test, and is an error then."""
    backends._warned.clear()
    yield
    backends._warned.clear()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each step that has tables, whether the kernel has made it."""
    found: list[bool] = []
    step_ = TritonFused.step_

    def counted(self: TritonFused, due: int | None, turn: int | None) -> bool:
        found.append(step_(self, due, turn))
        return found[-1]

    monkeypatch.setattr(TritonFused, "step_", counted)
    return found


def on_device(case: Case, dtype: torch.dtype = torch.float64) -> Case:
    model = case.model.to(DEVICE, dtype)
    return Case(case.name, model, case.plan, case.inputs.to(DEVICE, dtype))


def apart(make_case: Any, name: str, steps: int, before: Any = None, **settings: Any) -> float:
    """How far the kernel's weights and buffers are from those of torch operations."""
    found = []
    for backend in ("eager", "triton"):
        case = make_case()
        optimizer, enorm = trained(
            case, OPTIMIZERS[name], steps, fused=True, before=before, backend=backend, **settings
        )
        assert enorm.backend == backend
        found.append(everything(case.model, optimizer))
    return difference(found[1], found[0])


@pytest.mark.parametrize(("kind", "name", "order"), PAIRS)
def test_steps_are_those_of_torch_operations(
    kind: str, name: str, order: str, passes: list[bool]
) -> None:
    assert apart(lambda: on_device(make(kind, seed=3)), name, 7, order=order) < 1e-12
    # The first step starts, and makes the buffers.
    assert passes.count(True) >= 5


@pytest.mark.parametrize("name", ["adamw", "nesterov"])
def test_many_steps_are_the_same(name: str, passes: list[bool]) -> None:
    assert apart(lambda: on_device(make("shared", seed=3)), name, 40) < 1e-12
    assert passes.count(True) >= 38


SETTINGS: list[dict[str, Any]] = [
    {"p": 1, "c": 1.2},
    {"p": math.inf},
    {"p": 3, "cycles": 2},
    {"every": 3},
    {"exact": True, "start": "as_is"},
    {"last_layer": False},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_goes_with_it(settings: dict[str, Any]) -> None:
    assert apart(lambda: on_device(make("residual", seed=3)), "amsgrad", 6, **settings) < 1e-12


@pytest.mark.parametrize(
    ("dtype", "tolerance", "channels_last"),
    [(torch.float64, 1e-12, True), (torch.float32, 1e-5, False)],
)
def test_blocks_and_memory_orders_do_not_matter(
    dtype: torch.dtype, tolerance: float, channels_last: bool, passes: list[bool]
) -> None:
    def made() -> Case:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 18, 3, groups=2), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.ReLU(), nn.Linear(18 * 9, 33), nn.ReLU(),
            nn.Linear(33, 5),
        ).to(dtype)  # fmt: skip
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        x = torch.randn(2, 3, 10, 10, dtype=dtype)
        return on_device(case_of(model, enorm_fx.analyze(model, x), x), dtype)

    assert max(p.numel() for p in made().model.parameters()) > 4096
    assert apart(made, "adamw", 4, order="alternating") < tolerance
    assert any(passes)


def test_gradients_that_are_none_groups_and_schedulers(passes: list[bool]) -> None:
    def run(backend: str) -> dict[str, Tensor]:
        case = on_device(make("residual", seed=3))
        model = case.model
        named = dict(model.named_parameters())
        left_out = named.pop("up0.weight")
        first = {"params": [named.pop("embed.weight"), named.pop("head.bias")], "lr": 1e-2}
        second = {"params": list(named.values()), "weight_decay": 1e-2, "momentum": 0.5}
        optimizer = SGD([first, second], lr=1e-3, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        enorm = ENorm(case.plan, optimizer, fused=True, backend=backend)

        def before(number: int) -> None:
            if number < 2:
                model.get_parameter("down1.weight").grad = None
            if number == 5:
                model.get_parameter("up1.bias").grad = None
            if number > 0:
                scheduler.step()

        train(case, optimizer, None, 8, before)
        enorm.flush_()
        assert left_out not in optimizer.state
        return everything(model, optimizer)

    assert difference(run("triton"), run("eager")) < 1e-12
    assert passes.count(True) >= 5


def test_the_comparison_notices_a_wrong_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TritonFused._table

    def wrong(self: TritonFused, factors: dict[int, LineFactors]) -> Tensor:
        for number, line in factors.items():
            if line.cols is not None and line.rows is not None:
                factors[number] = LineFactors(line.width, line.rows, None)
        return table(self, factors)

    monkeypatch.setattr(TritonFused, "_table", wrong)
    assert apart(lambda: on_device(make("residual", seed=3)), "momentum", 4) > 1e-6


# ---- all or nothing ----


@pytest.mark.parametrize("name", ["sgd", "amsgrad"])
def test_nothing_is_written_where_a_number_is_not_finite(name: str) -> None:
    case = on_device(make("residual", seed=3))
    optimizer, enorm = waiting(case, OPTIMIZERS[name], backend="triton")
    assert enorm.backend == "triton"
    old, state = everything(case.model, optimizer), enorm.state_dict()
    for what, tensor in list(read_by_a_step(case.model, optimizer)):
        if "'down0" not in what and "'head" not in what:
            continue  # the interpreter is slow
        for place, value in ((0, math.nan), (-1, -math.inf)):
            good = float(tensor.view(-1)[place])
            tensor.view(-1)[place] = value
            poisoned = everything(case.model, optimizer)
            with pytest.raises(NonFiniteError, match=f"^{what} has 1 entries that are not finite"):
                optimizer.step()
            assert same_bits(everything(case.model, optimizer), poisoned)
            tensor.view(-1)[place] = good
    assert same_bits(everything(case.model, optimizer), old)
    assert enorm.state_dict() == state


def test_finite_gradients_that_overflow_are_refused() -> None:
    case = on_device(make("residual", seed=3), torch.float32)
    optimizer, _ = waiting(case, OPTIMIZERS["momentum"], backend="triton")
    optimizer.param_groups[0]["lr"] = 1.0
    for p in case.model.parameters():
        assert p.grad is not None
        p.grad.fill_(1e38)
    old = everything(case.model, optimizer)
    with pytest.raises(NonFiniteError, match=r"after this step .*nothing was written"):
        optimizer.step()
    assert same_bits(everything(case.model, optimizer), old)


@pytest.mark.parametrize("settings", [{"fused": True}, {"capturable": True}, {"foreach": True}])
def test_versions_and_counters_grow_and_gradients_stay(
    settings: dict[str, bool], passes: list[bool]
) -> None:
    if settings.get("capturable") and DEVICE == "cpu":
        pytest.skip("capturable=True is for a GPU")
    case = on_device(make("residual", seed=3))
    optimizer = Adam(case.model.parameters(), lr=1e-4, **settings)
    ENorm(case.plan, optimizer, fused=True, backend="triton")
    train(case, optimizer, None, 2)
    held = list(case.model.parameters())
    written = [*held, *(s[key] for s in optimizer.state.values() for key in ("exp_avg", "step"))]
    versions = [tensor._version for tensor in written]
    gradients = [p.grad.clone() for p in held if p.grad is not None]
    optimizer.step()
    assert passes[-1]
    assert all(tensor._version > v for tensor, v in zip(written, versions, strict=True))
    assert all(float(state["step"]) == 3 for state in optimizer.state.values())
    now = [p.grad for p in held if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(now, gradients, strict=True))


def reads(backend: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a usual step takes a number out of a tensor, which waits for the device."""
    case = on_device(make("residual", seed=3))
    optimizer = AdamW(case.model.parameters(), lr=1e-4, fused=True)
    ENorm(case.plan, optimizer, fused=True, backend=backend)
    train(case, optimizer, None, 3)
    count = [0]
    with monkeypatch.context() as patched:
        for name in ("tolist", "item", "__float__", "__int__", "__bool__"):
            method = getattr(Tensor, name)

            def counted(self: Tensor, method: Any = method) -> Any:
                count[0] += 1
                return method(self)

            patched.setattr(Tensor, name, counted)
        optimizer.step()
    return count[0]


def test_a_step_waits_for_the_device_once(
    monkeypatch: pytest.MonkeyPatch, passes: list[bool]
) -> None:
    assert reads("triton", monkeypatch) == 1
    assert passes[-1]
    assert reads("eager", monkeypatch) > 3


# ---- where it cannot be used ----


def test_it_is_for_steps_inside_the_optimizers() -> None:
    case = make("residual")
    with pytest.raises(ArgumentError, match=r"backend='triton' .* pass fused=True"):
        ENorm(case.plan, SGD(case.model.parameters()), backend="triton")


def test_without_triton_torch_operations_make_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "enorm_fx.step.fused.triton_kernels", raising=False)
    monkeypatch.delattr("enorm_fx.step.fused.triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    case = on_device(make("residual", seed=3))
    enorm = ENorm(case.plan, SGD(case.model.parameters()), fused=True, backend="triton")
    with pytest.warns(RuntimeWarning, match="'triton' cannot be used: triton cannot be imported"):
        assert enorm.backend == "eager"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_other_kinds_are_declined(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = triton_step._imported()
    if dtype == torch.float64:  # a compiled kernel reaches no memory of the CPU, nor the other way
        monkeypatch.setattr(kernels, "INTERPRETED", not kernels.INTERPRETED)
    case = on_device(make("residual", seed=3), dtype)
    enorm = ENorm(case.plan, SGD(case.model.parameters()), fused=True, backend="triton")
    with pytest.warns(RuntimeWarning, match=f"cannot be used: '.*' is {dtype} on {DEVICE}"):
        assert enorm.backend == "eager"


def test_what_does_not_run_is_known_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken:
        def __getitem__(self, _: object) -> Any:
            raise RuntimeError("no compiler")

    monkeypatch.setattr(triton_step._imported(), "update_", Broken())
    case = on_device(make("residual", seed=3))
    optimizer = OPTIMIZERS["momentum"](case.model.parameters())
    old = weights(case.model)
    enorm = ENorm(case.plan, optimizer, fused=True, backend="triton")
    with pytest.warns(RuntimeWarning, match="its kernels do not run: no compiler"):
        assert enorm.backend == "eager"
    assert same_bits(weights(case.model), old)


def test_nobody_imports_triton_who_does_not_ask_for_it() -> None:
    code = "import sys, enorm_fx.step.fused.step; sys.exit('triton' in sys.modules)"
    folder = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from enorm_fx.step.fused import triton_kernels as kernels
tables = {"tasks": "*i32", "table": "*i64", "gradients": "*i64"}
rates = {"rates_of": "*i64", "rates": "*fp64"}
for kernel, more, kinds in (
    (kernels.update_, rates, ({"KIND": 1}, {"KIND": 3})),
    (kernels.largest_, {"out": "*fp64"}, ({},)),
):
    for kind in kinds:
        chosen = {"W": kernels.DTYPES[torch.float32], "ALIGN": 16, "BLOCK": kernels.BLOCK, **kind}
        signature = {**tables, **more, **dict.fromkeys(chosen, "constexpr")}
        source = ASTSource(kernel, signature, constexprs=chosen)
        found = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm
        assert found["cubin"] and "ld.global.v4" in found["ptx"]
"""


@pytest.mark.skipif(torch.version.cuda is None, reason="triton has no compiler for CUDA")
def test_kernels_compile_for_a_gpu_and_read_four_numbers_at_once(tmp_path: Path) -> None:
    """Which needs none."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    folder = Path(__file__).parents[2]
    compiled = subprocess.run([sys.executable, "-c", COMPILE], cwd=folder, env=environment)
    assert compiled.returncode == 0
