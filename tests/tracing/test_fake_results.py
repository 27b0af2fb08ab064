"""Calls on fake tensors give what the calls give: where torch's rule for shapes refuses them, and
where a call like one before is answered from memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from enorm_fx import analyze
from enorm_fx.errors import TraceError
from enorm_fx.tracing import recorder, trace
from enorm_fx.tracing.fake_results import FakeResults
from enorm_fx.tracing.op_traits import GIVES_ALIKE
from tests.support.laws import record
from tests.support.op_cases_all import CASES

ENDS = torch.tensor([1, 3, 4], dtype=torch.int32)


class Grouped(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(x, self.weight, offs=ends)


def test_grouped_mm_in_float32_has_the_shape_that_it_has() -> None:
    model, x = Grouped(3, 8, 4), torch.ones(4, 8)
    last = trace(model, (x, ENDS), "symbolic").nodes[-1]
    real = model(x, ENDS)
    assert (last.op, last.out.shape, last.out.dtype) == ("grouped_mm", real.shape, real.dtype)


@pytest.mark.parametrize(
    ("shape", "x"), [((3, 4, 4), torch.ones(4, 8)), ((2, 8, 4), torch.ones(4, 8))]
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], x: Tensor) -> None:
    with pytest.raises(TraceError, match="the model raised RuntimeError"):
        trace(Grouped(*shape), (x, ENDS), "symbolic")


# --- answers from memory -----------------------------------------------------------------------


def kind(value: Any) -> Any:
    """All that is to be known of a fake result."""
    if isinstance(value, FakeTensor):
        return (
            value.shape, value.stride(), value.storage_offset(), value.dtype, value.device,
            value.layout, value.requires_grad, value.constant is None,
        )  # fmt: skip
    return [kind(item) for item in value] if isinstance(value, (tuple, list)) else value


class Checked(FakeResults):
    """Makes every call once more: from memory, and by torch."""

    checked: set[str]

    def of(self, key: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = super().of(key, function, args, kwargs)
        if key in GIVES_ALIKE:
            again = super().of(key, function, args, kwargs)
            assert kind(out) == kind(again) == kind(function(*args, **kwargs))
            self.checked.add(key)
        return out


def test_a_call_answered_from_memory_is_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every case of every op."""
    Checked.checked = set()
    monkeypatch.setattr(recorder, "FakeResults", Checked)
    for case in CASES:
        record(case.run, case.inputs)
    assert Checked.checked >= GIVES_ALIKE


def test_a_memory_that_takes_other_calls_for_the_same_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeResults, "_like_tensor", lambda self, tensor: tensor.ndim)
    mode = FakeTensorMode()
    Checked.checked = set()
    checked = Checked(mode)
    checked.of("relu", torch.relu, (tensor(mode, 2, 3),), {})
    with pytest.raises(AssertionError):
        checked.of("relu", torch.relu, (tensor(mode, 5, 3),), {})


def results() -> tuple[FakeTensorMode, FakeResults]:
    mode = FakeTensorMode()
    return mode, FakeResults(mode)


def tensor(mode: FakeTensorMode, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return mode.from_tensor(torch.ones(shape, dtype=dtype))


def test_each_answer_has_memory_of_its_own() -> None:
    mode, known = results()
    a = tensor(mode, 2, 3)
    outs = [known.of("relu", torch.relu, (a,), {}) for _ in range(3)]
    assert len({t.untyped_storage()._cdata for t in (a, *outs)}) == 4


@pytest.mark.parametrize("one", [1, True, 1.0])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_equal_numbers_of_other_types_are_other_calls(one: Any, dtype: torch.dtype) -> None:
    mode, known = results()
    a = tensor(mode, 2, dtype=dtype)
    for number in (1.0, 1, True, one):
        out = known.of("mul", torch.mul, (a, number), {})
        assert out.dtype == torch.mul(torch.ones(2, dtype=dtype), number).dtype


def test_what_a_result_depends_on_besides_is_part_of_the_call() -> None:
    mode, known = results()
    a, w = tensor(mode, 2, 3), tensor(mode, 4, 3)
    assert known.of("linear", F.linear, (a, w), {}).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert known.of("linear", F.linear, (a, w), {}).dtype == torch.bfloat16
    whole = tensor(mode, 2, dtype=torch.int64)
    assert known.of("div", torch.div, (whole, 2), {}).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert known.of("div", torch.div, (whole, 2), {}).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_call_that_writes_is_made_each_time() -> None:
    mode, known = results()
    a = tensor(mode, 2, 3)
    for _ in range(3):
        before = a._version
        assert known.of("relu", F.relu, (a,), {"inplace": True}) is a
        assert a._version == before + 1


def test_weights_that_were_made_in_inference_mode_are_analyzed() -> None:
    """They keep no count of what is written into them."""
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert analyze(model, torch.ones(2, 3), tracer="symbolic").num_scales == 4


def test_values_that_torch_knows_are_kept() -> None:
    mode, known = results()
    with mode:
        two = torch.tensor(2.0, dtype=torch.float64)
        for _ in range(2):
            assert known.of("mul", torch.mul, (two, 3.0), {}).item() == 6.0
