"""The balance benchmark: figures that fall, and an optimum that is one."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import enorm_fx
from benchmarks import balance
from benchmarks._balance_plot import draw, in_words
from benchmarks.balance import Limits, Network, first_within, measure, mlp
from benchmarks.unet import UNet

SMALL = Network(partial(mlp, 5, 8), (1, 8))


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """Five layers of width 8."""
    return measure(SMALL, seed=3)


# ---- what is measured ----


def test_both_gaps_fall_to_the_tolerance(small: dict[str, Any]) -> None:
    for run in (small["plain"], small["corrected"]):
        gaps, imbalances = run["objective_gap"], run["imbalance"]
        assert len(gaps) == len(imbalances) > 1
        assert gaps[0] > 1
        # Below 1e-14 rounding may raise J.
        assert all(after <= max(before, 1e-14) for before, after in itertools.pairwise(gaps))
        assert gaps[-1] <= 1e-10
        assert imbalances[-1] <= 1e-10 < imbalances[-2]
        assert run["cycles_to_imbalance"] == len(imbalances) - 1
        assert run["capped"] is None
        seconds = run["seconds_per_cycle"]
        assert 0 < seconds["fastest"] <= seconds["median"] <= seconds["slowest"]


def test_both_start_from_the_same_weights(small: dict[str, Any]) -> None:
    for figure in ("objective_gap", "imbalance"):
        assert small["plain"][figure][0] == small["corrected"][figure][0]


def test_the_correction_saves_cycles(small: dict[str, Any]) -> None:
    found = small["corrected"]["cycles_to_objective_gap"]
    assert found <= balance.ALLOWED
    assert small["plain"]["cycles_to_objective_gap"] > 2 * found
    assert balance.slow({"small": small}) == []


@pytest.mark.parametrize(
    "network",
    [
        Network(partial(mlp, 40, 16), (1, 16)),
        Network(partial(UNet, widths=(4, 6, 8)), (1, 3, 16, 16)),
    ],
    ids=["chain", "U-Net"],
)
def test_neither_depth_nor_skips_slow_the_correction(network: Network) -> None:
    row = measure(network, seed=1, limits=Limits(cycles=20))
    assert balance.slow({"network": row}) == []
    assert row["plain"]["capped"] == "cycles"
    assert row["plain"]["objective_gap"][-1] > 1e-5


def test_the_gap_is_that_of_what_balance_finds() -> None:
    """By a way of its own: weights measured before `enorm_fx.balance` and after it."""
    torch.manual_seed(3)
    model = mlp(5, 8).double()
    plan = enorm_fx.analyze(model, torch.randn(1, 8, dtype=torch.float64))
    plan.rescale_(torch.randn(plan.num_scales, dtype=torch.float64))
    descent, coarse = balance.begin(plan)
    best, optimum = balance.find_optimum(descent, coarse)
    first = balance.descend(descent, coarse, best, Limits())["objective_gap"][0]
    report = enorm_fx.balance(plan, tol=1e-13)
    assert best == pytest.approx(math.log(report.norm_after), rel=1e-12)
    assert first == pytest.approx(report.norm_before / report.norm_after - 1, rel=1e-2)
    assert optimum["imbalance"] < 1e-12


def test_a_descent_is_given_up_at_its_limits(small: dict[str, Any]) -> None:
    for limits, reason, cycles in ((Limits(2, 60.0), "cycles", 2), (Limits(9, 0.0), "seconds", 0)):
        run = measure(SMALL, seed=3, limits=limits)["plain"]
        assert run["capped"] == reason
        assert run["cycles_to_objective_gap"] is None
        assert run["objective_gap"] == small["plain"]["objective_gap"][: cycles + 1]
        assert balance.cycles(run, "objective_gap") == f"> {cycles}"
        assert in_words(run) == f"more than {cycles} cycles"
        assert balance.slow({"small": {"corrected": run}}) == ["small"]


def test_first_within() -> None:
    assert first_within([1.0, 1e-3, 1e-11, 1e-12]) == 2
    assert first_within([1.0, 1e-11, 1e-3, 1e-11]) == 3, "from there on, not once"
    assert first_within([0.0]) == 0
    assert first_within([0.0, math.nan]) is None
    assert first_within([]) is None
    with pytest.raises(ValueError, match="tolerance must be positive, not 0"):
        first_within([1.0], 0)


def test_a_network_without_a_minimum_is_refused() -> None:
    class Residual(nn.Module):
        """Its last weight is zero, so nothing keeps the first from shrinking for ever."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
            self.inner = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4))
            nn.init.zeros_(self.last.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            y: torch.Tensor = self.last(x + self.inner(x))
            return y

    model = Residual()
    with pytest.raises(ValueError, match="no minimum"):
        balance.begin(enorm_fx.analyze(model, torch.randn(1, 4)))


# ---- networks ----


def test_the_unet_joins_encoder_and_decoder() -> None:
    model = UNet(channels=3, classes=2, widths=(4, 6, 8))
    assert model(torch.zeros(1, 3, 16, 8)).shape == (1, 2, 16, 8)
    plan = enorm_fx.analyze(model, torch.zeros(1, 3, 16, 16))
    read = {pair.producer for pair in plan.pairs if pair.consumer == "decoders.1.0.weight"}
    read |= {pair.producer for pair in plan.pairs if pair.consumer == "decoders.1.0"}
    assert {name.removesuffix(".weight") for name in read} == {"encoders.0.2", "ups.1"}
    # Two groups per encoder; per decoder two and the transposed convolution.
    assert [group.channels for group in plan.groups].count(4) == 2 + 3
    assert enorm_fx.verify(plan).largest_change < 1e-9


def test_networks_that_are_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="two resolutions or more, not widths"):
        UNet(widths=(8,))
    with pytest.raises(ValueError, match="two layers or more, not 1"):
        mlp(1)


# ---- the program ----


def test_main_writes_json_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(balance, "NETWORKS", {"small": SMALL, "other": SMALL})
    path = tmp_path / "new" / "balance.json"
    assert balance.main(["--networks", "small", "--seed", "3", "--out", str(path)]) == 0
    record = json.loads(path.read_text(encoding="utf-8"))
    assert set(record) == {
        "benchmark", "environment", "tolerance", "spread", "most_cycles", "most_seconds",
        "networks",
    }  # fmt: skip
    assert record["environment"]["seed"] == 3
    assert record["environment"]["torch"] == str(torch.__version__)
    assert list(record["networks"]) == ["small"]
    row = record["networks"]["small"]
    assert set(row) == {
        "batchnorm", "groups", "scales", "optimum", "plain", "corrected",
    }  # fmt: skip
    assert (row["groups"], row["scales"]) == (4, 32)
    assert set(row["plain"]) == set(row["corrected"])
    found = [row[run]["cycles_to_objective_gap"] for run in ("plain", "corrected")]
    assert f"{found[0]} / {found[1]}" in capsys.readouterr().out


def test_main_fails_where_the_correction_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(balance, "NETWORKS", {"small": SMALL})
    monkeypatch.setattr(balance, "ALLOWED", 1)
    assert balance.main(["--networks", "small", "--out", str(tmp_path / "balance.json")]) == 1
    assert "small: more than 1 corrected cycles" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 4])
def test_the_picture_is_small(tmp_path: Path, small: dict[str, Any], count: int) -> None:
    pytest.importorskip("matplotlib")
    record = {
        "tolerance": 1e-10,
        "most_cycles": 300,
        "networks": {str(number): small for number in range(count)},
    }
    path = tmp_path / "picture.png"
    draw(path, record)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) < 150_000
