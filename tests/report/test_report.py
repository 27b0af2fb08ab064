"""Reports: one dict, whose text and tables say the same and say what they leave out."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

import enorm_fx
from enorm_fx.model_plan import Plan
from enorm_fx.report import tables as report
from enorm_fx.report.names import broken, folded, runs, short_source
from enorm_fx.report.page import html
from tests.support.plans import chain


class Residual(nn.Module):
    """A stem and `blocks` residual blocks with BatchNorm, then a classifier."""

    def __init__(self, blocks: int = 2, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(4, 6, 3, padding=1),
                nn.BatchNorm2d(6) if norm else nn.Identity(),
                nn.ReLU(),
                nn.Conv2d(6, 4, 3, padding=1),
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def _plan(blocks: int = 2, *, norm: bool = True, **options: Any) -> Plan:
    return enorm_fx.analyze(Residual(blocks, norm).eval(), torch.zeros(2, 3, 8, 8), **options)


def _shown(data: dict[str, Any], width: int = 100, **options: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, markup=False, highlight=False)
    report.show(console, data, title="a model", **options)
    return out.getvalue()


def _many_groups(data: dict[str, Any], count: int) -> dict[str, Any]:
    """The dict with `count` groups of two producers, under names that cannot be folded."""
    groups = [
        {
            "start": 8 * i,
            "channels": 8,
            "producers": [f"first{i * i}.weight", f"second{i * i}.weight"],
            "consumers": [f"third{i * i}.weight"],
            "via": ["relu"],
            "one_sided": False,
        }
        for i in range(2, 2 + count)
    ]
    return {**data, "groups": groups}


def test_dict_is_the_plan_in_json_types() -> None:
    plan = _plan()
    data = plan.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert list(data) == [
        "model", "tracer", "exact", "inexact_because", "notes", "num_scales", "totals", "groups",
        "pairs", "blocked", "parameters",
    ]  # fmt: skip
    assert (data["model"], data["tracer"]) == ("Residual", plan.tracer)
    assert (data["exact"], data["num_scales"]) == (plan.exact, plan.num_scales)
    assert [
        (g["start"], g["channels"], tuple(g["producers"]), tuple(g["consumers"]), tuple(g["via"]))
        for g in data["groups"]
    ] == [(g.start, g.channels, g.producers, g.consumers, g.via) for g in plan.groups]
    assert [
        (p["producer"], p["consumer"], p["channels"], tuple(p["via"])) for p in data["pairs"]
    ] == [(p.producer, p.consumer, p.channels, p.via) for p in plan.direct_pairs]
    every = plan.to_dict(all_pairs=True)
    assert [(p["producer"], p["consumer"]) for p in every.pop("pairs")] == [
        (p.producer, p.consumer) for p in plan.pairs
    ]
    assert every["totals"].pop("pairs") == len(plan.pairs) > data["totals"]["pairs"]
    assert every["groups"] == data["groups"]
    assert [tuple(b.values()) for b in data["blocked"]] == [
        (
            b.weight,
            b.side,
            b.reason,
            b.node,
            b.source,
            [{"reason": o.reason, "node": o.node, "source": o.source} for o in b.chain],
        )
        for b in plan.blocked
    ]
    assert [
        (p["name"], tuple(p["shape"]), p["depth"], p["counted"], p["rescaled"])
        for p in data["parameters"]
    ] == [(p.name, p.shape, p.depth, p.counted, bool(p.terms)) for p in plan.parameters]


def test_dict_is_the_same_every_time() -> None:
    assert json.dumps(_plan().to_dict()) == json.dumps(_plan().to_dict())


def test_totals_count_what_is_listed() -> None:
    data = _plan().to_dict()
    model = Residual()
    weights = [p for p in model.parameters() if p.ndim > 1]
    assert data["totals"] == {
        "weights": len(weights),
        "entries": sum(p.numel() for p in weights),
        "rescaled_weights": len(weights),
        "groups": 3,
        "one_sided_groups": 0,
        "pairs": len(data["pairs"]),
        "blocked_sides": 2,
    }
    assert data["num_scales"] == 4 + 6 + 6


@pytest.mark.parametrize(
    ("norm", "options", "reasons"),
    [
        (False, {}, []),
        (True, {"batchnorm": "affine"}, []),
        (True, {}, ["batchnorm"]),
        (False, {"biases": "skip"}, ["biases"]),
        (True, {"batchnorm": "affine", "biases": "skip"}, ["biases"]),
        (True, {"biases": "skip"}, ["batchnorm", "biases"]),
    ],
)
def test_says_why_a_plan_is_not_exact(
    norm: bool, options: dict[str, Any], reasons: list[str]
) -> None:
    plan = _plan(norm=norm, **options)
    data = plan.to_dict()
    assert plan.exact == (not reasons)
    assert [reason.partition("=")[0] for reason in data["inexact_because"]] == reasons
    sentence = report.exactness(data)
    assert sentence.startswith("not exact: " if reasons else "exact: ")
    assert all(f'{reason}="skip"' in sentence for reason in reasons)
    assert sentence in str(plan)


def test_text_of_a_small_plan() -> None:
    plan = _plan(blocks=1, norm=False)
    assert str(plan) == (
        f"Plan for Residual ({plan.tracer} front end): 4 weights, 10 scales in 2 groups, 3 pairs, "
        "2 blocked sides\n"
        "exact: rescaling keeps the model's function\n"
        "  channels  producers         consumers\n"
        "         4  stem, blocks.0.3  blocks.0.0, head\n"
        "         6  blocks.0.0        blocks.0.3"
    )


def test_text_says_how_many_groups_it_leaves_out() -> None:
    plan = _plan(blocks=12)
    lines = str(plan).splitlines()
    assert len(plan.groups) == 13
    assert lines[-1] == "  and 3 more groups: see plan.groups"
    assert len(lines) == 2 + 1 + 10 + 1


def test_text_of_a_plan_without_groups() -> None:
    nothing = _plan().select(lambda group: False)
    assert "0 scales in 0 groups, 0 pairs" in str(nothing)
    assert "No weight can be rescaled." in _shown(nothing.to_dict())


def test_a_stream_is_one_group_with_all_ends() -> None:
    plan = _plan(norm=False)
    stream = next(group for group in plan.groups if len(group.producers) > 1)
    assert stream.producers == ("stem.weight", "blocks.0.3.weight", "blocks.1.3.weight")
    table = _shown(plan.to_dict()).partition("Pairs:")[0]
    for name in (*stream.producers, *stream.consumers):
        assert re.search(rf"\b{re.escape(name.removesuffix('.weight'))}\b", table)
    assert "Groups with several producers or consumers: 1 of 3" in table


def test_single_pairs_are_told_once_and_all_pairs_on_request() -> None:
    data = _plan().to_dict()
    total = len(data["pairs"])
    short = _shown(data)
    assert f"Pairs: 2, the other {total - 2} are in the groups above" in short
    everything = _shown(data, everything=True)
    assert f"Pairs: {total}\n" in everything
    assert "Groups: 3 of 3" in everything
    rows = everything.partition("Pairs:")[2].partition("Blocked")[0]
    for pair in data["pairs"]:
        ends = (pair["producer"], pair["consumer"])
        row = r"\s+".join(re.escape(name.removesuffix(".weight")) for name in ends)
        assert re.search(rf"^ +{pair['channels']} +{row} +\w", rows, re.MULTILINE), row


def test_many_pairs_that_are_alike_are_one_row() -> None:
    text = _shown(_plan(blocks=17).to_dict())
    folded_row = r"17 x 6 +blocks\.\{0\.\.16\}\.0 +blocks\.\{0\.\.16\}\.3 +batch_norm\w* relu"
    assert re.search(folded_row, text)
    assert "--all spells them out" in text
    spelled = _shown(_plan(blocks=17).to_dict(), everything=True)
    assert "{" not in spelled
    assert re.search(r"blocks\.11\.0 +blocks\.11\.3", spelled)


@pytest.mark.parametrize(
    ("count", "line"), [(12, None), (13, "1 more group is"), (30, "18 more groups are")]
)
def test_says_how_many_groups_are_left_out(count: int, line: str | None) -> None:
    data = _many_groups(_plan().to_dict(), count)
    text = _shown(data)
    assert ("--all shows" in text) == (line is not None)
    assert line is None or f"{line} not shown: --all shows" in text
    shown = sum(f"first{i * i} " in text for i in range(2, 2 + count))
    assert shown == min(count, 12)
    everything = _shown(data, everything=True)
    assert all(f"first{i * i} " in everything for i in range(2, 2 + count))
    assert "not shown" not in everything


def test_says_how_many_pairs_are_left_out() -> None:
    data = _many_groups(_plan().to_dict(), 40)
    data["groups"] = [{**g, "producers": g["producers"][:1]} for g in data["groups"]]
    text = _shown(data)
    assert "16 more pairs are not shown: --all shows them" in text
    assert text.count("third") == 24


def test_blocked_sides_with_one_reason_are_one_row() -> None:
    data = _plan(batchnorm="affine").to_dict()
    text = _shown(data, width=120).partition("Blocked")[2]
    reasons = {(b["reason"], b["side"]) for b in data["blocked"]}
    assert len(reasons) < len(data["blocked"])
    assert text.count("normalizes") == 1
    assert re.search(r"2 outputs +blocks\.0\.0 +first: blocks\.0\.1\.batch_norm", text)
    assert f"of weights: {len(data['blocked'])}" in text


def test_blocked_reasons_beyond_the_limit_are_counted() -> None:
    data = _plan().to_dict()
    side = data["blocked"][0]
    data["blocked"] = [{**side, "reason": f"reason {i // 2}"} for i in range(20)]
    assert "4 more blocked sides are not shown: --all shows them" in _shown(data)
    everything = _shown(data, everything=True)
    assert everything.count("reason ") == 20


def test_long_lists_of_blocked_weights_say_how_many_follow() -> None:
    data = _plan().to_dict()
    side = data["blocked"][0]
    data["blocked"] = [{**side, "weight": f"layer{i * i}"} for i in range(2, 12)]
    assert "and 2 more: --all" in _shown(data)
    assert "layer121" in _shown(data, everything=True)


def test_long_paths_say_how_many_ops_follow() -> None:
    data = _plan().to_dict()
    ops = ["batch_norm", "relu", "max_pool2d", "relu", "flatten", "dropout"]
    data["groups"] = [{**group, "via": ops} for group in data["groups"]]
    data["pairs"] = [{**pair, "via": ops} for pair in data["pairs"]]
    squeezed = " ".join(_shown(data, width=160).split())
    assert "batch_norm relu max_pool2d relu ... (+2)" in squeezed
    assert "dropout" not in squeezed
    assert "dropout" in _shown(data, everything=True)


def test_one_sided_groups_are_marked() -> None:
    data = _plan().to_dict()
    data["groups"] = [{**group, "consumers": [], "one_sided": True} for group in data["groups"]]
    data["totals"]["one_sided_groups"] = 3
    text = " ".join(_shown(data, width=160).split())
    assert "(one-sided: keeps factor 1)" in text
    assert "3 groups (3 one-sided: factor 1)" in text


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("everything", [False, True])
def test_no_line_is_wider_than_the_terminal(width: int, everything: bool) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_rather_long_name = nn.Sequential(nn.Sequential(Residual(3)))

        def forward(self, x: Tensor) -> Tensor:
            return self.a_rather_long_name(x)  # type: ignore[no-any-return]

    plan = enorm_fx.analyze(Deep().eval(), torch.zeros(2, 3, 8, 8))
    text = _shown(plan.to_dict(), width=width, everything=everything)
    assert max(map(len, text.splitlines())) <= width


def test_notes_of_the_plan_are_told_everywhere() -> None:
    plan = replace(_plan(), notes=("The analysis ends early.",))
    data = plan.to_dict()
    assert data["notes"] == ["The analysis ends early."]
    assert "\nThe analysis ends early.\n" in str(plan)
    assert re.search(r"^note +The analysis ends early\.", _shown(data), re.MULTILINE)
    assert "The analysis ends early.</p>" in html(plan)


def test_notes_and_title_are_printed() -> None:
    text = _shown(_plan().to_dict(), notes=[("traced", "in [no] time")])
    assert text.startswith("a model\n")
    assert re.search(r"traced +in \[no\] time", text)


def test_a_plan_made_by_hand_needs_no_names() -> None:
    plan = chain((3, 4, 5)).plan
    assert str(plan).startswith("Plan for ")
    assert "one-sided" in _shown(plan.to_dict())


def test_breaks_names_after_dots_but_not_inside_braces_or_file_names() -> None:
    assert broken("short", 10) == ["short"]
    assert broken("features.block{1..16}.conv", 20) == ["features.", "  block{1..16}.conv"]
    assert broken("package/module.py:12", 14) == ["package/", "  module.py:12"]
    assert broken("x" * 12, 5) == ["xxxxx", "  xxx", "  xxx", "  x"]


def test_folds_only_numbers_that_count_up() -> None:
    assert folded([f"b.{i}.c.weight" for i in range(5)]) == ["b.{0..4}.c"]
    assert folded([f"b.{i}.weight" for i in (0, 2, 4, 6, 8)]) == [f"b.{i}" for i in range(0, 9, 2)]
    assert folded([f"b{i:02}" for i in range(8, 13)]) == ["b{08..09}", "b{10..12}"]
    assert folded(["a.1", "a.2", "a.3", "a.4"]) == ["a.1", "a.2", "a.3", "a.4"]
    assert folded([]) == ["-"]


def test_folds_one_number_in_each_name() -> None:
    pairs = [((), (f"a.{i}.x.{i}", "b")) for i in range(3)]
    assert [run.spelled() for run in runs(pairs, fold=True)] == [names for _, names in pairs]


def _expanded(name: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if match is None:
        return [name]
    numbers = range(int(match[1]), int(match[2]) + 1)
    return [f"{name[: match.start()]}{i}{name[match.end() :]}" for i in numbers]


_NAMES = st.tuples(
    st.sampled_from(["a", "b.c"]), st.integers(0, 12), st.sampled_from(["", ".d", "x"]),
    st.integers(0, 12),
).map(lambda parts: "{}.{}{}.{}".format(*parts))  # fmt: skip


@given(st.lists(_NAMES, max_size=30, unique=True))
def test_folded_names_expand_to_the_names(names: list[str]) -> None:
    assert sorted(n for line in folded(names) if line != "-" for n in _expanded(line)) == sorted(
        names
    )


@given(st.lists(st.tuples(st.integers(1, 2), _NAMES, _NAMES), max_size=30))
def test_folded_pairs_expand_to_the_pairs(pairs: list[tuple[int, str, str]]) -> None:
    result = []
    for run in runs(((key, (one, two)) for key, one, two in pairs), fold=True):
        sides = [_expanded(name) for name in run.spelled()]
        sides = [side * run.count if len(side) == 1 else side for side in sides]
        result += [(run.key, *ends) for ends in zip(*sides, strict=True)]
        assert len(sides[0]) == run.count
    assert sorted(result) == sorted(pairs)


def test_sources_are_shown_from_the_package_or_the_working_directory(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert short_source("/usr/lib/site-packages/torchvision/models/vgg.py:7") == (
        "torchvision/models/vgg.py:7"
    )
    assert short_source(f"{tmp_path.as_posix()}/net.py:3") == "net.py:3"
    assert short_source("/elsewhere/net.py:3") == "/elsewhere/net.py:3"
    assert short_source("") == ""
