"""The benchmark of start-up: every figure is there, and its committed record too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import start
from benchmarks._environment import RESULTS


def test_writes_and_prints_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "start.json"
    assert start.main(["--repeats", "1", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert list(record["commands"]) == list(start.COMMANDS)
    for case, imports in start.CASES.items():
        figures = record["analyses"][case]
        assert list(figures) == [
            *(f"import {name}" for name in imports), "first analysis", "later analyses",
        ]  # fmt: skip
        for figure in figures.values():
            assert 0 < figure["min"] <= figure["median"] <= figure["max"]
    assert "first analysis" in capsys.readouterr().out


def test_the_committed_figures_keep_what_is_promised() -> None:
    record = json.loads((RESULTS / "start.json").read_text())
    assert max(figure["median"] for figure in record["commands"].values()) < 0.3
    warm = record["analyses"]["after torch._dynamo"]
    assert warm["first analysis"]["median"] - warm["later analyses"]["median"] < 0.5
