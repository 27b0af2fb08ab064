"""Backends: threads, dtypes and memory orders do not matter; where one cannot run, eager does."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from enorm_fx.enorm import ENorm
from enorm_fx.errors import NonFiniteError
from enorm_fx.step import backends
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.native import compiler
from tests.support.helpers import (
    BACKENDS,
    buffers,
    careful,
    copied,
    largest_error,
    make,
    restore_,
    same_bits,
    tensors_of,
    trained,
    weights,
)
from tests.support.plans import Case


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """One warning a process, one library a process: each test starts as a new process would."""
    backends._warned.clear()
    yield
    backends._warned.clear()
    compiler.load.cache_clear()


# ---- what every backend does ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_notices_that_weights_were_written(backend: str) -> None:
    case = make("residual", seed=3)
    loss = case.model(case.inputs).square().mean()
    ENorm(case.plan, last_layer=True, backend=backend, start="as_is").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refusal_leaves_every_bit_and_the_next_step_works(backend: str) -> None:
    case = make("residual", seed=3)
    optimizer = trained(case)
    enorm = ENorm(case.plan, optimizer, last_layer=True, backend=backend, start="as_is")
    enorm.step()
    weight = case.model.get_parameter("up1.weight")
    good = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = torch.nan
    old, old_buffers = weights(case.model), buffers(optimizer)
    with pytest.raises(NonFiniteError, match=r"'up1\.weight' has 1 entries that are not finite"):
        enorm.step()
    assert same_bits(weights(case.model), old)
    assert same_bits(buffers(optimizer), old_buffers)
    with torch.no_grad():
        weight.copy_(good)
    enorm.step()
    assert not same_bits(weights(case.model), old)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_too_large_for_the_fast_way_go_the_careful_way(backend: str) -> None:
    case = make("chain-linear", seed=3)
    case.model.float()
    first, *_, last = [p for p in case.model.parameters() if p.dim() > 1]
    with torch.no_grad():
        first *= 1e15
        last *= 1e-15
    expected, _ = careful(case, torch.optim.SGD(case.model.parameters(), lr=0.1))
    ENorm(case.plan, last_layer=True, backend=backend, start="as_is").step()
    assert largest_error(weights(case.model), expected) < 1e-5


# ---- large enough for threads ----


def _wide(dtype: torch.dtype, channels_last: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3),
        nn.ReLU(),
        nn.Conv2d(64, 130, 3),
        nn.ReLU(),
        nn.Conv2d(130, 64, 1, groups=2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.ReLU(),
        nn.Linear(64 * 9, 300),
        nn.ReLU(),
        nn.Linear(300, 203),
        nn.ReLU(),
        nn.Linear(203, 5),
    ).to(dtype)
    return model.to(memory_format=torch.channels_last) if channels_last else model


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 2e-3)],
)
@pytest.mark.parametrize("p", [1, 2, 3, float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_dtypes_and_memory_orders_do_not_matter(
    backend: str, p: float, dtype: torch.dtype, tolerance: float, channels_last: bool
) -> None:
    import enorm_fx

    model = _wide(dtype, channels_last)
    plan = enorm_fx.analyze(model, torch.randn(2, 3, 10, 10, dtype=dtype))
    case = Case("wide", model, plan, torch.randn(2, 3, 10, 10, dtype=dtype))
    optimizer = trained(case)
    # A buffer whose memory has another order than its weight.
    state = optimizer.state[model[8].weight]
    state["momentum_buffer"] = state["momentum_buffer"].t().contiguous().t()
    program = CarefulStep(plan, plan.groups, p=float(p), c=1.1)
    tensors = tensors_of(case.model, optimizer)
    old = copied(tensors)
    program.run_((optimizer,), None, 2)
    expected = copied(tensors)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        restore_(tensors, old)
        enorm = ENorm(
            plan, optimizer, p=p, c=1.1, cycles=2, last_layer=True, backend=backend, start="as_is"
        )
        enorm.step()
    finally:
        torch.set_num_threads(threads)
    assert enorm.backend == backend
    assert plan.num_scales > 600
    assert _relative_to_the_largest(tensors, expected) < tolerance


def _relative_to_the_largest(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(
        float((actual[k].double() - v.double()).abs().max() / v.double().abs().max())
        for k, v in expected.items()
    )


# ---- falling back ----


def test_without_a_compiler_eager_runs_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.load.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    case = make("residual", seed=3)
    expected, _ = careful(case, torch.optim.SGD(case.model.parameters(), lr=0.1))
    enorm = ENorm(case.plan, last_layer=True, start="as_is")
    with pytest.warns(RuntimeWarning, match=r"backend='eager', since 'native' .*no C\+\+ compiler"):
        enorm.step()
    assert enorm.backend == "eager"
    assert largest_error(weights(case.model), expected) < 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ENorm(case.plan, backend="native", start="as_is").step()


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler.load.cache_clear()
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'out of ink' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(compiler.CompilerError, match="out of ink"):
        compiler.load()


@pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a compiler")
def test_the_library_is_compiled_once_and_without_a_trace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler.load.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler.load()
    (library,) = (tmp_path / "enorm_fx").iterdir()  # no temporary file is left
    compiler.load.cache_clear()
    monkeypatch.setattr(compiler.subprocess, "run", None)
    compiler.load()
    assert list((tmp_path / "enorm_fx").iterdir()) == [library]


@pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a compiler")
def test_memory_with_gaps_is_left_to_eager() -> None:
    case = make("chain-linear", seed=3)
    weight = next(p for p in case.model.parameters() if p.dim() > 1)
    roomy = torch.zeros(weight.shape[0], 2 * weight.shape[1], dtype=weight.dtype)
    roomy[:, ::2] = weight.detach()
    weight.data = roomy[:, ::2]
    expected, _ = careful(case, torch.optim.SGD(case.model.parameters(), lr=0.1))
    enorm = ENorm(case.plan, last_layer=True, backend="native", start="as_is")
    with pytest.warns(RuntimeWarning, match="memory with gaps"):
        enorm.step()
    assert enorm.backend == "eager"
    assert largest_error(weights(case.model), expected) < 1e-12
    assert not roomy[:, 1::2].any()


def test_no_cuda_no_graph() -> None:
    case = make("chain-linear", seed=3)
    enorm = ENorm(case.plan, backend="cudagraph", start="as_is")
    with pytest.warns(RuntimeWarning, match="do not all lie on one CUDA device"):
        enorm.step()
    assert enorm.backend == "eager"


def test_the_code_can_be_read_before_the_first_step_and_changes_nothing() -> None:
    case = make("residual", seed=3)
    old = weights(case.model)
    enorm = ENorm(case.plan, last_layer=True, start="as_is")
    assert "up1_weight" in enorm.code
    assert same_bits(weights(case.model), old)


@pytest.mark.parametrize("backend", BACKENDS)
def test_settings_that_save_digits_do_not_reach_the_step(backend: str) -> None:
    case = make("residual", seed=3)
    case.model.float()
    expected, _ = careful(case, torch.optim.SGD(case.model.parameters(), lr=0.1))
    enorm = ENorm(case.plan, last_layer=True, backend=backend, start="as_is")
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            enorm.step()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert largest_error(weights(case.model), expected) < 1e-6


# ---- what only a GPU runs, as far as it can be shown without one ----


class _Step:
    """Stands for a generated step on a device."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.mode = "eager"

    def run(self) -> Tensor:
        self.runs.append(self.mode)
        return torch.ones((), dtype=torch.bool)


@contextlib.contextmanager
def _nothing(*_: object, **__: object) -> Iterator[None]:
    yield


def _fake_cuda(monkeypatch: pytest.MonkeyPatch, step: _Step, error: str = "") -> None:
    class Graph:
        def replay(self) -> None:
            step.runs.append("replay")

    @contextlib.contextmanager
    def capture(graph: Graph, capture_error_mode: str) -> Iterator[None]:
        assert isinstance(graph, Graph)
        assert capture_error_mode == "thread_local"
        if error:
            raise RuntimeError(error)
        step.mode = "capture"
        yield
        step.mode = "eager"

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device", _nothing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: step.runs.append("synchronize"))


def test_a_graph_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = _Step()
    _fake_cuda(monkeypatch, step)
    replayed = backends.Replayed(step)  # type: ignore[arg-type]
    assert all(bool(replayed.run()) for _ in range(4))
    # The capture itself does nothing on the device: every call makes one step.
    assert step.runs == ["eager", "synchronize", "capture", "replay", "replay", "replay"]


def test_a_capture_that_fails_gives_way_to_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    step = _Step()
    _fake_cuda(monkeypatch, step, error="operation not permitted when stream is capturing")
    replayed = backends.Replayed(step)  # type: ignore[arg-type]
    replayed.run()
    with pytest.warns(RuntimeWarning, match="not permitted when stream is capturing"):
        replayed.run()
    replayed.run()
    assert step.runs == ["eager", "synchronize", "eager", "eager"]


def test_an_asynchronous_check_reports_at_the_next_step() -> None:
    case = make("residual", seed=3)
    enorm = ENorm(case.plan, last_layer=True, backend="eager", check="async", start="as_is")
    enorm.step()
    with torch.no_grad():
        case.model.get_parameter("up1.weight")[0, 0] = torch.nan
    old = weights(case.model)
    enorm.step()
    assert same_bits(weights(case.model), old)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"'up1\.weight' has 1 entries"):
            enorm.step()
        assert same_bits(weights(case.model), old)
        enorm.step()
    with torch.no_grad():
        case.model.get_parameter("up1.weight")[0, 0] = 1.0
    enorm.step()
    assert not same_bits(weights(case.model), old)
