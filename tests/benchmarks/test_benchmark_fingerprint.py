"""The benchmark of fingerprints measures what it says, and fails where a figure is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import fingerprint as benchmark
from tests.support.zoo_small import ZOO


@pytest.fixture(autouse=True)
def _two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "ZOO", [s for s in ZOO if s.name in ("mlp", "conv chain")])
    monkeypatch.setattr(benchmark, "NETWORKS", {})


def test_a_run_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fingerprint.json"
    assert benchmark.main(["--trials", "3", "--out", str(out)]) == 0
    assert "torch.float32: 6 rescalings of 2 models" in capsys.readouterr().out
    row = json.loads(out.read_text())["types"]["torch.float32"]
    assert (row["models"], row["rescalings"], row["taken_for_changes"]) == (2, 6, 0)
    assert 0 < row["median_distance"] <= row["largest_distance"] < 8
    assert row["smallest_distance_of_changes"]["0.001"] > 1000


@pytest.mark.parametrize("equal", [0.0, 1e300])
def test_a_wrong_figure_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equal: float
) -> None:
    monkeypatch.setattr(benchmark, "EQUAL", equal)
    assert benchmark.main(["--trials", "1", "--out", str(tmp_path / "x.json")]) == 1


def test_the_model_is_left_as_it_was() -> None:
    for _, model, inputs in benchmark.models(torch.float32):
        old = {k: v.clone() for k, v in model.state_dict().items()}
        benchmark.distances(model, inputs, 1)
        assert all(torch.equal(v, old[k]) for k, v in model.state_dict().items())


def test_the_committed_figures_hold() -> None:
    record = json.loads((benchmark.RESULTS / "fingerprint.json").read_text())
    for row in record["types"].values():
        assert row["rescalings"] >= 1000
        assert row["taken_for_changes"] == row["changes_not_seen"]["0.0001"] == 0
