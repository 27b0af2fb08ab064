"""The sweep: what is stopped goes on, figures are kept apart, and the paper's plan runs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sweep import __main__ as sweep
from benchmarks.sweep.questions import QUESTIONS, grid, over
from benchmarks.sweep.store import FIGURES, key

pytest.importorskip("sklearn")

TINY = grid(
    [{"dataset": "digits", "validation": 100, "n_layers": 1, "width": 8, "epochs": 1}],
    [{"way": "alone", "norm": "none"}, {"way": "ENorm", "norm": "none", "enorm": 1.0}],
    over("lr", 0.01, 1e9),
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The question "depth" is a small one; the runs that were made are listed."""
    monkeypatch.setitem(QUESTIONS, "depth", TINY)
    made: list[Any] = []
    real = sweep.run

    def run(choice: Any, seed: int, place: sweep.Place) -> Any:
        made.append((key(choice), seed))
        return real(choice, seed, place)

    monkeypatch.setattr(sweep, "run", run)
    return made


def _record(folder: Path, *options: str) -> dict[str, Any]:
    assert sweep.main(["depth", "--output", str(folder), *options]) == 0
    record: dict[str, Any] = json.loads((folder / "depth.json").read_text(encoding="utf-8"))
    return record


def test_what_was_stopped_goes_on(tmp_path: Path, tiny: list[Any]) -> None:
    whole = _record(tmp_path / "whole", "--seeds", "2")
    assert len(tiny) == len(set(tiny)) == 8
    assert [line["choice"] for line in whole["choices"]] == TINY
    for line in whole["choices"]:
        assert line["seeds"] == [0, 1]
        assert all(len(line[name]) == 2 for name in FIGURES)
    tiny.clear()
    assert "choices" in _record(tmp_path / "parts", "--minutes", "0")
    assert not tiny
    _record(tmp_path / "parts", "--seeds", "1")
    assert len(tiny) == 4
    parts = _record(tmp_path / "parts", "--seeds", "2")
    assert len(tiny) == len(set(tiny)) == 8
    for one, two in zip(whole["choices"], parts["choices"], strict=True):
        for name in (*FIGURES[:6], "choice", "seeds"):
            assert one[name] == two[name], name


def test_a_run_that_is_not_finite_has_no_figure(tmp_path: Path, tiny: list[Any]) -> None:
    fine, wild = _record(tmp_path, "--seeds", "1")["choices"][2:]
    assert wild["train_loss"] == [None]
    assert fine["train_loss"][0] > 0
    assert 0 < fine["enorm_share"][0] < 1


def test_what_was_measured_otherwise_is_not_mixed(
    tmp_path: Path, tiny: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    _record(tmp_path, "--seeds", "1", "--set", "epochs=1", "batch_size=512")
    kept = (tmp_path / "depth.json").read_bytes()
    assert sweep.main(["depth", "--output", str(tmp_path)]) == 2
    assert "was measured otherwise (options differ)" in capsys.readouterr().err
    assert (tmp_path / "depth.json").read_bytes() == kept
    assert sweep.main(["depth", "--data", "digits", "--output", str(tmp_path)]) == 2
    assert "write NAME=PATH" in capsys.readouterr().err


def test_every_choice_is_a_command_line_of_its_own() -> None:
    for question, choices in QUESTIONS.items():
        assert len({key(choice) for choice in choices}) == len(choices), question
        for choice in choices:
            sweep.as_settings(choice, sweep.Place("cpu", {}, {}))


def test_the_papers_plan_runs_on_a_folder_of_cifar10(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np = pytest.importorskip("numpy")
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        images = np.random.default_rng(0).integers(256, size=(4, 3072)).astype(np.uint8)
        content = {b"labels": [0, 1, 8, 9], b"data": images}
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
    paper = QUESTIONS["paper"]
    few = [c for c in paper if c.get("n_layers", 3) == 3 and c["lr"] == 0.02]
    assert {c.get("model_type", "linear") for c in few} == {"linear", "conv"}
    monkeypatch.setitem(QUESTIONS, "paper", few)
    words = ["paper", "--data", f"cifar10={tmp_path}", "--seeds", "1", "--output", str(tmp_path)]
    assert sweep.main([*words, "--set", "epochs=1", "validation=4", "width=8"]) == 0
    record = json.loads((tmp_path / "paper.json").read_text(encoding="utf-8"))
    assert [line["choice"] for line in record["choices"]] == few
    assert record["options"] == {"epochs": 1, "validation": 4, "width": 8}
    for line in record["choices"]:
        assert line["train_loss"][0] > 0
        assert 0 <= line["test_accuracy"][0] <= 1
