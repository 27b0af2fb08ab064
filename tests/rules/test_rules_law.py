"""One law for every rule: inputs scaled as labelled give an output scaled as labelled."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from enorm_fx.rules import elementwise, join, linear, product, registry, shape, table
from enorm_fx.rules.registry import Context
from enorm_fx.symmetry.labels import Label, LabelTerm, add
from tests.support.laws import Recorded, admitted_scales, found_scales, law_deviation, record
from tests.support.op_cases import OpCase
from tests.support.op_cases_all import CASES

UNREACHABLE = {"cuda": "needs a GPU"}
if importlib.util.find_spec("transformers") is None:
    UNREACHABLE["grouped_mm"] = "torch's own takes no float64, that of transformers does"
# Ops without a derivative, with a random mask, or declined by their rule: nothing to count.
NOT_COUNTED = {
    *UNREACHABLE, "addbmm", "alpha_dropout", "argmax", "argmin", "argsort", "bitwise_and",
    "bitwise_not", "bitwise_or", "bitwise_xor", "ceil", "copy", "feature_alpha_dropout", "floor",
    "fold", "frac", "grid_sample", "hardshrink", "isfinite", "isinf", "isnan", "kthvalue",
    "logical_and", "logical_not", "logical_or", "logical_xor", "mode", "round", "sort", "topk",
    "trunc",
}  # fmt: skip
VIOLATED = 1e-3  # relative; what a wrong rule must exceed


@functools.cache
def recorded(case: OpCase) -> Recorded:
    return record(case.run, case.inputs)


@functools.cache
def _admitted_by(op: object) -> int:
    case = next(c for c in CASES if op in (c, c.spelling_of))
    return admitted_scales(recorded(case))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inputs_scaled_as_labelled_give_an_output_scaled_as_labelled(case: OpCase) -> None:
    found = recorded(case)
    assert law_deviation(found) <= case.tolerance
    if not case.slack:
        assert found_scales(found) == _admitted_by(case.spelling_of or case)
    elif case.scales is not None:
        assert found_scales(found) == case.scales


def test_every_rule_has_a_case() -> None:
    covered = set().union(*(recorded(case).ops for case in CASES))
    assert sorted(set(table()) - covered) == sorted(UNREACHABLE)


def test_every_rule_but_these_is_held_to_completeness() -> None:
    strict = (recorded(c).ops for c in CASES if not c.slack or c.scales is not None)
    assert sorted(set(table()) - set().union(*strict)) == sorted(NOT_COUNTED)


# --- the law must be able to reject ------------------------------------------------------------


def _passes(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Label:
    return Label(ctx.shape, input.terms)


def _first_of_two(ctx: Context, input: Label, other: Any, *args: Any, **kwargs: Any) -> Label:
    return add(ctx.shape, input)


def _cat_swapped(ctx: Context, tensors: Any, dim: int = 0) -> Any:
    return join.concatenate(ctx, list(tensors)[::-1], dim)


def _linear_without_cancelling(
    ctx: Context, input: Label, weight: Label, bias: Label | None = None
) -> Label:
    rows = LabelTerm(1, ctx.known(weight).terms[0].ids.reshape(-1)[: ctx.shape[-1]])
    return Label(ctx.shape, (LabelTerm(1, rows.ids.reshape(*(1,) * (len(ctx.shape) - 1), -1)),))


def _linear_with_the_axes_swapped(
    ctx: Context, input: Label, weight: Label, bias: Label | None = None
) -> Label:
    return linear.linear(ctx, input, _transposed(ctx.known(weight)), bias)


def _transposed(label: Label) -> Label:
    terms = tuple(LabelTerm(t.coefficient, t.ids.t()) for t in label.terms)
    return Label(label.shape, terms)


def _first_entry(ctx: Context, input: Label, dim: Any = None, *args: Any, **kwargs: Any) -> Label:
    def first(ids: Tensor) -> Tensor:
        return ids[(slice(0, 1),) * ids.ndim].reshape((1,) * len(ctx.shape))

    return input.map(ctx.shape, first)


def _rows_of_the_first(ctx: Context, input: Label, other: Label) -> Label:
    return input.map(ctx.shape, lambda ids: ids[..., 0])


def _window_by_its_first(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Label:
    return input.map(ctx.shape, lambda ids: ids[..., : ctx.shape[-1]])


def _same_axes(ctx: Context, input: Label, *dims: Any, **kwargs: Any) -> Label:
    return shape.reshape(ctx, input)


def _next_one(ctx: Context, input: Any, index: Any) -> Any:
    return shape.getitem(ctx, input, -1 if index == 0 else 0)


def _bounds_ignored(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Label:
    return elementwise.homogeneous(ctx, input)


def _gate_ignored(ctx: Context, input: Label, dim: int = -1) -> Label:
    return input.map(ctx.shape, lambda ids: elementwise._narrow(ids, dim, 0, ctx.shape[dim]))


def _slope_passes(ctx: Context, input: Label, weight: Label) -> Label:
    return add(ctx.shape, input, Label(input.shape, weight.terms[:1]))


def _choice_by_the_first(ctx: Context, condition: Label, input: Label, other: Any) -> Label:
    return add(ctx.shape, input)


def _as_a_reshape(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Label:
    return shape.reshape(ctx, input)


def _by_the_first_matrix(ctx: Context, input: Label, mat2: Label, offs: Label) -> Label:
    first = mat2.map(mat2.shape[1:], lambda ids: ids[0])
    label: Label = product.matmul(ctx, input, first)
    return label


def _direction_passes(ctx: Context, v: Label, g: Label, dim: int = 0) -> Label:
    return add(ctx.shape, v, g)


def _norm_over_rows_alone(ctx: Context, v: Label, g: Label, dim: int = 0) -> Label:
    ctx.system.uniform(v, [1])
    return add(ctx.shape, g)


def _slices_reversed(ctx: Context, input: Label, *args: Any, **kwargs: Any) -> Any:
    return shape.split(ctx, input, *args, **kwargs)[::-1]


MUTANTS: list[tuple[str, Callable[..., Any], str]] = [
    ("sigmoid", _passes, "torch.sigmoid()"),
    ("softmax", _passes, "torch.softmax(0)"),
    ("gelu", _passes, "F.gelu()"),
    ("hardtanh", _passes, "nn.Hardtanh(0, 1)"),
    ("square", _passes, "torch.square()"),
    ("reciprocal", _passes, "torch.reciprocal()"),
    ("sqrt", _passes, "torch.sqrt()"),
    ("clamp", _bounds_ignored, "torch.clamp(0.1)"),
    ("glu", _gate_ignored, "F.glu dim 1"),
    ("prelu", _slope_passes, "torch.prelu"),
    ("add", _first_of_two, "torch.add()"),
    ("sub", _first_of_two, "torch.sub()"),
    ("maximum", _first_of_two, "torch.maximum()"),
    ("mul", _first_of_two, "torch.mul()"),
    ("div", _first_of_two, "torch.div()"),
    ("where", _choice_by_the_first, "where"),
    ("cat", _cat_swapped, "cat of powers"),
    ("linear", _linear_without_cancelling, "nn.Linear on (2, 3)"),
    ("linear", _linear_with_the_axes_swapped, "one layer twice"),
    ("matmul", _rows_of_the_first, "matmul (2, 3) (3,)"),
    ("grouped_mm", _by_the_first_matrix, "grouped_mm"),
    ("as_strided", _as_a_reshape, "torch.as_strided((3, 2), (1, 3))"),
    ("mean", _first_entry, "torch.mean()"),
    ("amax", _first_entry, "torch.amax()"),
    ("prod", _first_entry, "torch.prod(dim=0)"),
    ("permute", _same_axes, "permute of a square"),
    ("getitem", _next_one, "x[0]"),
    ("chunk", _slices_reversed, "torch.chunk(2, 0)"),
    ("batch_norm", _passes, "nn.BatchNorm1d eval"),
    ("layer_norm", _passes, "nn.LayerNorm"),
    ("weight_norm", _direction_passes, "weight_norm dim 0"),
    ("weight_norm", _norm_over_rows_alone, "weight_norm dim 0"),
    ("max_pool1d", _window_by_its_first, "nn.MaxPool1d"),
]


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], None]:
    def put(key: str, function: Callable[..., Any]) -> None:
        entry = replace(table()[key], function=function, signature=inspect.signature(function))
        monkeypatch.setitem(registry._RULES, key, entry)

    return put


@pytest.mark.parametrize(("key", "wrong", "name"), MUTANTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_wrong_rule_breaks_the_law(
    key: str, wrong: Callable[..., Any], name: str, mutate: Callable[..., None]
) -> None:
    case = next(c for c in CASES if c.name == name)
    assert law_deviation(record(case.run, case.inputs)) <= case.tolerance
    mutate(key, wrong)
    assert law_deviation(record(case.run, case.inputs)) > VIOLATED


@pytest.mark.parametrize("key", ["relu", "add", "mul", "cat", "matmul", "transpose", "mean"])
def test_a_rule_that_pins_too_much_is_found_incomplete(
    key: str, mutate: Callable[..., None]
) -> None:
    name = {
        "cat": "cat dim 0",
        "matmul": "matmul (2, 3) (3, 2)",
        "transpose": "torch.transpose(0, 1)",
    }
    case = next(c for c in CASES if c.name == name.get(key, f"torch.{key}()"))
    mutate(key, lambda ctx, *args, **kwargs: NotImplemented)
    found = record(case.run, case.inputs)
    assert law_deviation(found) <= case.tolerance
    assert found_scales(found) < admitted_scales(found)


def test_a_wrong_label_on_one_entry_is_noticed() -> None:
    found = record(torch.relu, (torch.tensor([[1.0, -2.0], [3.0, 4.0]]).double(),))
    node = found.trace.nodes[-1].index
    ids = found.labels.values[node].terms[0].ids.clone()
    ids[1, 1] = ids[0, 0]
    found.labels.values[node] = Label((2, 2), (LabelTerm(1, ids),))
    assert law_deviation(found) > VIOLATED
