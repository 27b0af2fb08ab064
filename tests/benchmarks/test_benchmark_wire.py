"""The count of bytes that a step sends in parts."""

from __future__ import annotations

import json

import torch
from torch import nn

import enorm_fx
from benchmarks._environment import RESULTS
from benchmarks.wire import MODELS, bytes_of_a_step


def test_the_bytes_of_a_chain_are_one_number_for_each_unit_and_side() -> None:
    layers = [nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False)]
    plan = enorm_fx.analyze(nn.Sequential(*layers), torch.randn(2, 5))
    counted = bytes_of_a_step(plan, cycles=2)
    # Each weight has one cell for each of the seven units: both are vectors, brought together.
    assert counted["bytes"] == (7 + 7) * 4 + 2 * 8 + 48
    assert counted["gradient_bytes"] == 4 * 7 * 8

    layers = [nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)]
    plan = enorm_fx.analyze(nn.Sequential(*layers), torch.randn(2, 5))
    # The weight in the middle is a matrix of cells, whose rows and columns are summed every cycle.
    assert bytes_of_a_step(plan, cycles=2)["bytes"] == 2 * (7 + 6) * 4 + (7 + 6) * 4 + 5 * 8 + 48


class _Branches(nn.Module):
    """Three matrices write into one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5, False), nn.Linear(6, 3, False)
        self.branches = nn.ModuleList(nn.Linear(5, 6, False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu()
        found: torch.Tensor = self.last(sum(b(hidden) for b in self.branches).relu())
        return found


def test_what_one_side_of_a_group_needs_travels_once() -> None:
    counted = bytes_of_a_step(enorm_fx.analyze(_Branches(), torch.randn(2, 4)))
    # Of the branches 5 columns and 6 rows, once for all three; first and last are vectors.
    assert counted["bytes"] == (5 + 6) * 4 + (5 + 6) * 4 + 5 * 8 + 48


def test_the_committed_figures_are_of_the_models_of_the_script() -> None:
    record = json.loads((RESULTS / "wire.json").read_text(encoding="utf-8"))
    assert record["models"].keys() == MODELS.keys()
    for row in record["models"].values():
        assert row["ratio"] == row["bytes"] / row["gradient_bytes"]
        assert row["ratio"] < 0.001
    resnet, llama = (f"{100 * row['ratio']:.2g}%" for row in record["models"].values())
    readme = (RESULTS.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"{resnet} of the bytes of resnet50's gradients and {llama} of a 7B Llama's" in readme
