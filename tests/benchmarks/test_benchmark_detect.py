"""The comparison with other libraries counts what it says, and fails where a figure is wrong."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import _detect_pass as one_pass
from benchmarks import detect

ROOT = Path(__file__).parents[2]
SOUND = {"regions": 1, "channels": 8, "independent": 8, "seconds": 0.1, "change": 0.0}


def _found(**other: Any) -> dict[str, Any]:
    return {**SOUND, "sound": True, **other}


def test_a_run_without_peers_writes_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "detect.json"
    assert detect.main(["--only", "squeezenet1_1", "--output", str(out)]) == 0
    assert "25/2,944" in capsys.readouterr().out
    record = json.loads(out.read_text())
    row = record["models"]["squeezenet1_1"]["enorm_fx"]
    assert (row["regions"], row["channels"], row["sound"]) == (25, 2944, True)
    assert record["problems"] == []
    assert set(record["versions"]) == {"enorm_fx"}


def test_a_process_that_dies_costs_one_model(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho \'{"version": "1"}\'\n'
        'case "$*" in *good*) echo noise; echo \'{"good": {}}\';; esac\nexit 3\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    found = list(detect.run("brevitas", str(python), ["good", "bad", "worse"], 0))
    error = {"error": "the process ended with status 3"}
    assert found == [("version", "1"), ("good", {}), ("bad", error), ("worse", error)]


def test_a_python_that_cannot_run_a_library_is_an_error() -> None:
    with pytest.raises(SystemExit, match="/bin/false cannot run brevitas"):
        list(detect.run("brevitas", "/bin/false", ["alexnet"], 0))


def test_overlapping_regions_are_counted_once() -> None:
    def region(*slices: str) -> list[dict[tuple[str, str, int], int]]:
        return [{(name, "srcs", k): 1 for name in slices} for k in range(4)]

    assert one_pass.independent([region("a"), region("b")]) == 8
    assert one_pass.independent([region("a"), region("b"), region("a", "b")]) == 8
    assert one_pass.independent([region("a", "b"), region("b", "c"), region("a", "c")]) == 12
    assert one_pass.independent([region("a"), region("a")]) == 4
    assert one_pass.independent([]) == 0


@pytest.mark.parametrize(
    ("row", "problems"),
    [
        ({"enorm_fx": _found(), "brevitas": _found()}, 0),
        ({"enorm_fx": _found(), "brevitas": _found(channels=9)}, 0),  # overlapping
        ({"enorm_fx": _found(), "brevitas": _found(independent=9)}, 1),
        ({"enorm_fx": _found(), "brevitas": _found(independent=9, sound=False)}, 0),
        ({"enorm_fx": _found(), "torch-pruning": _found(independent=None, channels=99)}, 0),
        ({"enorm_fx": _found(sound=False, change=0.1)}, 1),
        ({"enorm_fx": {"error": "no"}}, 1),
    ],
)
def test_where_a_figure_is_wrong(row: dict[str, Any], problems: int) -> None:
    assert len(detect.wrong({"model": row})) == problems


def test_what_a_library_raises_and_an_unsound_change_are_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raises(model: nn.Module, inputs: Any) -> dict[str, Any]:
        raise KeyError("conv\nmore")

    passes = {"raises": raises, "unsound": lambda model, inputs: {**SOUND, "change": 1e-3}}
    monkeypatch.setattr(one_pass, "PASSES", passes)
    model, inputs = nn.Linear(2, 2), torch.zeros(1, 2)
    assert one_pass.guarded("raises", model, inputs) == {"error": "KeyError: 'conv\\nmore'"}
    assert one_pass.guarded("unsound", model, inputs)["sound"] is False


def test_relu6_is_replaced_where_the_name_says_so() -> None:
    for name, expected in (("mobilenet_v2", 35), ("mobilenet_v2" + one_pass.AS_RELU, 0)):
        model, _ = one_pass.made(name, 0)
        assert sum(isinstance(module, nn.ReLU6) for module in model.modules()) == expected


def test_the_committed_figures_hold() -> None:
    record = json.loads((detect.RESULTS / "detect.json").read_text())
    assert tuple(record["models"]) == detect.MODELS
    assert set(record["versions"]) == {"enorm_fx", "brevitas", "aimet", "torch-pruning"}
    assert record["problems"] == detect.wrong(record["models"]) == []
    assert detect.markdown(record) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_what_is_not_measured_anew_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "detect.json"
    other = {"alexnet": {"enorm_fx": _found(), "brevitas": _found()}}
    versions = {"enorm_fx": "0", "brevitas": "1"}
    out.write_text(json.dumps({"models": other, "versions": versions}))
    found = iter([("version", "2"), ("alexnet", _found(channels=9))])
    monkeypatch.setattr(detect, "run", lambda *args: found)
    assert detect.main(["--only", "alexnet", "--output", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["versions"] == {"enorm_fx": "2", "brevitas": "1"}
    assert record["models"]["alexnet"]["enorm_fx"]["channels"] == 9
    assert record["models"]["alexnet"]["brevitas"] == other["alexnet"]["brevitas"]
    capsys.readouterr()
    assert detect.main(["--table", "--output", str(out)]) == 0
    assert capsys.readouterr().out == (
        "| model | enorm_fx 2 | brevitas 1 |\n| --- | --- | --- |\n"
        "| alexnet | 1/9 (8 independent), 0.1 s | 1/8, 0.1 s |\n"
        "| largest change | 0e+00 | 0e+00 |\n"
    )
