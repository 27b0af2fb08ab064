"""The benchmark of badly scaled starts: what its committed record promises, and one small run."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import scaled_start
from benchmarks._environment import RESULTS
from benchmarks.data import load

pytest.importorskip("sklearn")


def test_enorm_never_diverges_where_the_balanced_network_does_not() -> None:
    record = json.loads((RESULTS / "scaled_start.json").read_text())
    assert record["cpu_seconds"] < 600
    ends = {
        (r["dataset"], r["network"], r["way"], r["seed"]): r["diverged"] for r in record["runs"]
    }
    assert len(ends) == 2 * 3 * 5 * len(scaled_start.WAYS)
    fine = [key for key, bad in ends.items() if key[2] == "balanced network, SGD" and not bad]
    assert fine
    assert not any(ends[d, n, "ENorm, last_layer", seed] for d, n, _, seed in fine)
    assert all(bad for key, bad in ends.items() if key[2] == "SGD")
    assert record["summary"] == scaled_start.summarize(record["runs"])


def test_a_run_is_told_apart_from_one_that_diverges() -> None:
    data = load("digits", None, torch.device("cpu"))
    before = torch.get_rng_state()
    plain = scaled_start.run("MLP", data, {}, 0, 1)
    balanced = scaled_start.run("MLP", data, {"last_layer": True, "backend": "eager"}, 0, 1)
    assert plain["diverged"]
    assert not balanced["diverged"]
    assert balanced["test_accuracy"] > 0.5
    assert torch.equal(torch.get_rng_state(), before)
