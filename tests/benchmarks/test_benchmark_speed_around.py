"""The benchmark of what surrounds native code: what it writes adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks._environment import RESULTS
from benchmarks.speed import around
from benchmarks.speed.networks import Network, stack
from enorm_fx.step.native.compiler import find_compiler

pytestmark = pytest.mark.skipif(not find_compiler(), reason="no compiler")


def test_it_measures_and_writes_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Network("tiny", lambda norm: stack(8, 3, 4), (5, 8), 4, norms=("none",))
    monkeypatch.setattr(around, "networks", lambda: {around.NETWORK: tiny})
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # other tests have theirs
    out = tmp_path / "found.json"
    assert around.main(["--rounds", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len({(row["optimizer"], row["fused"], row["natively"]) for row in rows}) == 8
    for row in rows:
        assert 0 < row["compiled"] < row["call"]
        assert row["around"] == pytest.approx(row["call"] - row["compiled"])
    assert around.markdown(rows) in capsys.readouterr().out


def test_the_committed_run_says_what_the_changelog_does() -> None:
    rows = json.loads((RESULTS / "speed_around.json").read_text())["rows"]
    by = {(row["optimizer"], row["fused"], row["natively"]): row["around"] for row in rows}
    for optimizer in ("SGD", "AdamW"):
        for fused in (False, True):
            assert by[optimizer, fused, True] < by[optimizer, fused, False]
