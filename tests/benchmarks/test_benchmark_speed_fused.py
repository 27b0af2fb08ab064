"""The benchmark of fused steps: what it writes adds up."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

import enorm_fx
from benchmarks._environment import RESULTS
from benchmarks.speed import fused
from benchmarks.speed.networks import Network, stack


def test_it_measures_and_writes_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Network("tiny", lambda norm: stack(8, 3, 4), (5, 8), 4, norms=("none",))
    monkeypatch.setattr(fused, "networks", lambda: {"tiny": tiny})
    out = tmp_path / "found.json"
    assert fused.main(["--visits", "2", "--rounds", "1", "--budget", "0", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert set(record["networks"]["tiny"]) == {"SGD", "AdamW"}
    for row in record["networks"]["tiny"].values():
        assert len(row["visits"]) == len(row["ratios_by_visit"]) == 2
        assert row["ratios"]["alone"] == 1
        for title in fused.TITLES:
            by_visit = [
                visit[title]["median"] / visit["alone"]["median"] for visit in row["visits"]
            ]
            assert row["ratios"][title] == pytest.approx(statistics.median(by_visit))
        assert row["bytes_alone"] in (5 * 4 * row["parameters"], 7 * 4 * row["parameters"])
    table = fused.markdown(record)
    assert table in capsys.readouterr().out
    assert table.count("\n| tiny | ") == 2
    assert str(tmp_path) not in out.read_text()
    if importlib.util.find_spec("matplotlib"):
        assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_floors_count_what_a_pass_reads_and_writes() -> None:
    """Two groups move the second of three matrices, and no kernel is read again."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 5, 3)
    )
    plan = enorm_fx.analyze(model, torch.randn(1, 2, 6, 6))
    entries = sum(p.numel() for p in model.parameters())
    for name, own in (("SGD", 5), ("AdamW", 7)):
        found = fused.floors(name, plan)
        assert found["unfused"] == 2
        assert found["fused"] == found["alternating"] == 1 + 1 / own
        read = found["fused, uncached"] * own * entries
        assert read == pytest.approx((own + 1) * entries + 3 * 4)


def test_the_readme_has_the_table_of_the_committed_run() -> None:
    record = json.loads((RESULTS / "speed_fused.json").read_text())
    assert fused.markdown(record) in (RESULTS.parents[1] / "README.md").read_text()
