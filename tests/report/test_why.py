"""`--why`: every side of every weight is told, with what moves it or with what pins it."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from itertools import groupby

import pytest
import torch
from torch import Tensor, nn

import enorm_fx
from enorm_fx.errors import ArgumentError
from enorm_fx.model_plan import Plan
from enorm_fx.plan.records import Blocked
from enorm_fx.report.why import explain
from enorm_fx.rules import Origin


class Tied(nn.Module):
    """One weight under two names, and one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.unread = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.one(x))))
        return self.last(x)  # type: ignore[no-any-return]


class Half(nn.Module):
    """The second half of what `first` makes goes through a tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.first(x).split([4, 2], dim=1)
        both = torch.cat([one.relu(), two.tanh()], dim=1)
        return self.second(both)  # type: ignore[no-any-return]


@cache
def _plan(name: str) -> Plan:
    if name == "transformer":
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return enorm_fx.analyze(layer, torch.zeros(2, 3, 16))
    models = pytest.importorskip("torchvision.models")
    model, _, batchnorm = name.partition(":")
    return enorm_fx.analyze(getattr(models, model)().eval(), batchnorm=batchnorm or "skip")


PLANS = ("resnet18", "resnet18:affine", "mobilenet_v2", "mobilenet_v2:affine", "transformer")


@pytest.mark.parametrize("name", PLANS)
def test_every_blocked_side_is_explained_by_its_op_and_its_chain(name: str) -> None:
    plan = _plan(name)
    assert plan.blocked
    for blocked in plan.blocked:
        told = explain(plan, blocked.weight, width=10_000).splitlines()
        steps = told[told.index(f"  {blocked.side.capitalize()} side: pinned.") + 1 :]
        assert steps[0].lower().startswith(f"    1. {blocked.reason.lower()}")
        assert blocked.node == "input" or f"({blocked.node}, " in steps[0]
        chain = [step for step, _ in groupby((o.reason, o.node, o.source) for o in blocked.chain)]
        for number, ((reason, node, _), line) in enumerate(zip(chain, steps[1:], strict=False), 2):
            assert line.startswith(f"    {number}. {reason[:1].upper()}{reason[1:]}")
            assert node in line
        end = steps[1 + len(chain)]
        assert re.fullmatch(r"    \d+\. So what \S+ (makes|reads) keeps its values", end)


def test_brackets_and_commas_in_a_path_are_part_of_it() -> None:
    plan = _plan("transformer")
    odd = "/home/me (copy), old/net (2).py:7"
    chain = (Origin("'add' ties the scales", "block (1).add", odd),)
    blocked = Blocked("linear1.weight", "output", "it is read", "x (y).call", odd, chain)
    told = explain(replace(plan, blocked=(blocked,)), "linear1.weight", width=10_000)
    assert f"    1. It is read (x (y).call, {odd})\n" in told
    assert f"    2. 'add' ties the scales (block (1).add, {odd})\n" in told


@pytest.mark.parametrize("name", PLANS)
def test_every_end_of_a_group_is_explained_by_the_group(name: str) -> None:
    plan = _plan(name)
    for number, group in enumerate(plan.groups):
        for weight in (*group.producers, *group.consumers):
            told = explain(plan, weight, width=10_000)
            part = told.partition(f"    Group {number}: {group.channels} channels")[2]
            lines = part.splitlines()
            ends = [line.replace(" (this)", "") for line in lines[1:4] if "passes" not in line]
            for line, verb, names in zip(
                ends, ("d multiplies", "divides"), (group.producers, group.consumers), strict=False
            ):
                assert line == f"      - {verb} " + ", ".join(
                    n.removesuffix(".weight") for n in names
                )


@pytest.mark.parametrize("width", [40, 60, 100])
def test_lines_fit_where_words_do(width: int) -> None:
    plan = _plan("transformer")
    for parameter in plan.parameters:
        for line in explain(plan, parameter.name, width=width).splitlines():
            assert len(line) <= width or len(line.split()) <= 2 or "/" in line


def test_says_which_op_stands_between_weight_and_normalization() -> None:
    told = explain(_plan("transformer"), "linear2", width=10_000)
    assert re.search(r"1\. 'layer_norm' normalizes its input \(norm2\.layer_norm, ", told)
    assert re.search(r"2\. 'add' ties the scales of what it touches \(add, ", told)
    assert "3. So what linear2 makes keeps its values" in told


def test_a_module_stands_for_the_weights_in_it() -> None:
    plan = _plan("resnet18")
    assert explain(plan, "layer1.0.conv1") == explain(plan, "layer1.0.conv1.weight")
    block = explain(plan, "layer2.0")
    assert [text.split()[0] for text in block.split("\n\n")] == [
        "layer2.0.conv1.weight", "layer2.0.conv2.weight", "layer2.0.downsample.0.weight",
    ]  # fmt: skip


def test_biases_and_what_stays_behind() -> None:
    plan = _plan("resnet18")
    assert "It keeps its values, as what fc makes does." in explain(plan, "fc.bias")
    assert 'batchnorm="skip" looks through the layer' in explain(plan, "bn1.weight")
    mlp = enorm_fx.analyze(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    assert "It takes the factors of group 0 (4 channels), which multiply 0" in explain(
        mlp, "0.bias"
    )


def test_tied_unread_and_frozen_weights() -> None:
    plan = enorm_fx.analyze(Tied())
    one, two = explain(plan, "one"), explain(plan, "two.weight")
    assert one == two
    assert "also called two.weight" in one
    assert "and 1 more" in one.splitlines()[0]
    assert "unread.weight, which no call of the model reads" in explain(plan, "unread.weight")
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4).requires_grad_(False))
    frozen = explain(enorm_fx.analyze(layers), "2")
    assert "The parameter is frozen (requires_grad=False) (2.weight)\n" in frozen


def test_says_how_many_slices_are_free() -> None:
    plan = enorm_fx.analyze(Half())
    assert "Output side: rescalable in 4 of 6 slices." in explain(plan, "first")
    assert "Input side: rescalable in 4 of 6 slices." in explain(plan, "second")


def test_a_side_whose_group_was_left_out_says_so() -> None:
    plan = _plan("resnet18").select(lambda group: False)
    assert "Output side: no group of this plan moves it." in explain(plan, "conv1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer3.0.conv", "close to it: layer3.0.conv"),
        ("layer3.0.conv1.weigth", "close to it: layer3.0.conv1.weight, "),
        ("", "it has conv1, conv1.weight, bn1 ..."),
        ("layer3.0.", "close to it: layer"),
    ],
)
def test_an_unknown_name_is_told_with_the_closest_ones(name: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(f"no weight '{name}'; ")) as caught:
        explain(_plan("resnet18"), name)
    assert message in str(caught.value)


def test_a_model_without_parameters_has_no_weights() -> None:
    plan = enorm_fx.analyze(nn.ReLU(), torch.zeros(2, 3))
    with pytest.raises(ArgumentError, match="it has no parameters at all"):
        explain(plan, "weight")
