"""The benchmark of fused steps: what it writes adds up."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

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
        assert row["bytes"]["alone"] in (5 * 4 * row["parameters"], 7 * 4 * row["parameters"])
    table = fused.markdown(record)
    assert table in capsys.readouterr().out
    assert table.count("\n| tiny | ") == 2
    assert str(tmp_path) not in out.read_text()


def test_the_readme_has_the_table_of_the_committed_run() -> None:
    record = json.loads((RESULTS / "speed_fused.json").read_text())
    assert fused.markdown(record) in (RESULTS.parents[1] / "README.md").read_text()
