"""No backend touches memory that is not a plain tensor's: each case in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import enorm_fx
from enorm_fx.errors import PlanError
from enorm_fx.step.memory import check_plain
from tests.support.dangerous import CASES, Wrapper, ways


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str, bool], tuple[int, str]]:
    """(case, how the step was made, late) -> (how its process ended, what it raised)."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.dangerous"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    rows = map(json.loads, run.stdout.splitlines())
    return {(r["case"], r["way"], r["late"]): (r["status"], r["told"]) for r in rows}


_PLACES = {"buffer_freed": "the buffer 'momentum_buffer' of '2.weight'"}


@pytest.mark.parametrize(("way", "late"), ways())
@pytest.mark.parametrize("name", [*CASES])
def test_dangerous_memory_is_refused_by_name(
    name: str, way: str, late: bool, outcomes: dict[tuple[str, str, bool], tuple[int, str]]
) -> None:
    status, told = outcomes[name, way, late]
    assert status == 0
    if (name, way) == ("buffer_freed", "balance"):  # it is not told of the optimizer
        assert told == "nothing was raised"
        return
    if name == "sharded":  # weights in parts are no danger; what was made before knows them not
        assert told.startswith(_sharded(way, late))
        return
    assert told.startswith(f"PlanError: {_PLACES.get(name, repr('2.weight'))} ")
    assert "nothing was written" in told
    assert "TOUCHED" not in told


def _sharded(way: str, late: bool) -> str:
    if way == "balance":
        return "nothing was raised"
    return "PlanError: 'the model' was" if late else "ArgumentError: the SGD holds none of the"


class Named(nn.Parameter):
    """A parameter with an attribute more, as several libraries have."""

    note = "plain all the same"


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 4),
        nn.Parameter(torch.zeros(4, 3).t()),
        torch.zeros(9)[2:8].view(2, 3),
        torch.zeros(8, 8)[::2, ::2],
        Named(torch.zeros(2)),
        torch.zeros(0, 4),
        torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ],
    ids=["plain", "transposed", "offset", "gaps", "subclass", "empty", "channels_last"],
)
def test_plain_tensors_pass(tensor: torch.Tensor) -> None:
    check_plain(tensor, "it")
    assert type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


@pytest.mark.parametrize(
    "tensor",
    [
        Wrapper(torch.zeros(2)),
        torch.zeros(2).to_sparse(),
        torch.zeros(1).expand(3),
        torch.zeros(8).as_strided((4, 3), (1, 1)),
        torch.zeros(9).unfold(0, 3, 2),
    ],
    ids=["wrapper", "sparse", "expanded", "overlapping", "windows"],
)
def test_others_do_not(tensor: torch.Tensor) -> None:
    with pytest.raises(PlanError, match=r"^it .*nothing was written"):
        check_plain(tensor, "it")


@pytest.mark.parametrize("shared", ["expanded", "overlapping"])
def test_nothing_is_written_where_entries_share_memory(shared: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    memory = torch.randn(8)
    weight = memory[:3].expand(4, 3) if shared == "expanded" else memory.as_strided((4, 3), (1, 1))
    model[0].weight = nn.Parameter(weight)
    plan = enorm_fx.analyze(model, torch.randn(5, 3))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(PlanError, match=r"'0\.weight'.*share one place.*nothing was written"):
        plan.rescale_(torch.ones(plan.num_scales))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
