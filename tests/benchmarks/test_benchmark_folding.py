"""The benchmark of folding measures what it says, and fails where a figure is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import folding as benchmark


def _network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    first = [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.Sequential(*first, nn.Conv2d(4, 3, 1), nn.ReLU(), nn.BatchNorm2d(3))
    return model, torch.randn(1, 2, 6, 6)


def test_what_is_folded_and_why_the_rest_is_not() -> None:
    row = benchmark.examine(*_network())
    assert (row["folded"], row["left"]) == (1, 1)
    assert row["reasons"] == {"it reads the result of ..., not that of a layer": 1}
    assert max(row["change"], row["change_put_back"]) < benchmark.EXACT


@pytest.mark.parametrize("limit", [benchmark.EXACT, -1.0])
def test_a_run_writes_its_figures_and_a_wrong_one_fails(
    limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "EXACT", limit)

    def models(suite: str, only: list[str], seed: int) -> list[tuple[str, Any, Any]]:
        return [(name, *_network()) for name in only]

    monkeypatch.setattr(benchmark, "models", models)
    out = tmp_path / "folding.json"
    status = benchmark.main(["--only", "small", "--output", str(out)])
    record = json.loads(out.read_text())
    assert (record["folded"], record["left"]) == (1, 1)
    assert (status, record["wrong"]) == ((1, ["small"]) if limit < 0 else (0, []))


def test_the_committed_figures_hold() -> None:
    record = json.loads((benchmark.RESULTS / "folding.json").read_text())
    assert tuple(record["models"]) == benchmark.MODELS
    assert record["wrong"] == []
    assert record["largest_change"] < benchmark.EXACT
    assert record["folded"] == sum(row["folded"] for row in record["models"].values())
