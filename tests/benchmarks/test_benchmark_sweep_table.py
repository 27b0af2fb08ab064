"""The sweep's tables: those of the page are what the files give, and wrong ones would be seen."""

from __future__ import annotations

import math
import re
import statistics
from typing import Any

import pytest

from benchmarks.sweep import plot, table
from benchmarks.sweep.paired import paired_p, two_sided
from benchmarks.sweep.questions import ALONG, QUESTIONS
from benchmarks.sweep.store import FIGURES, key

PAGE = table.PAGE.read_text(encoding="utf-8")


def test_the_page_has_the_tables_of_the_files() -> None:
    named = re.findall(r"<!-- table: (.*) -->", PAGE)
    assert sorted(named) == sorted(table.rendered())
    assert table.updated(PAGE) == PAGE, "run python -m benchmarks.sweep.table --update"


def test_a_wrong_figure_on_the_page_would_be_seen() -> None:
    for name, text in table.rendered().items():
        cell = text.splitlines()[2].split("|")[2]
        wrong = PAGE.replace(text, text.replace(cell, " 99.9 ± 0.1 ", 1))
        assert wrong != PAGE, name
        assert table.updated(wrong) == PAGE, name


def test_the_readme_sums_up_the_tables() -> None:
    readme = (table.PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    [paragraph] = [p for p in readme.split("\n\n") if "small networks and few steps" in p]
    tables = {t.name: t for t in table.TABLES}
    record = table.read(table.FOLDER / "scaled_start.json")
    figures = []
    for way in ("alone", "ENorm, last_layer", "balanced once"):
        for name in ("SGD with momentum", "AdamW"):
            cell = table.best(tables[name], record, way, {"sigma": 2.0})
            assert cell is not None
            figures.append(f"{statistics.mean(cell.figures):.1f}%")
    assert re.findall(r"[\d.]+%", paragraph)[: len(figures)] == figures


@pytest.mark.parametrize("path", sorted(table.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_committed_figures_are_those_of_the_plan(path: Any) -> None:
    record = table.read(path)
    assert record["environment"]["torch"]
    if record["benchmark"] == "along":
        assert {key(run["choice"]) for run in record["runs"]} == set(map(key, ALONG))
        return
    assert record["options"] == {}
    planned = list(map(key, QUESTIONS[record["question"]]))
    assert [key(line["choice"]) for line in record["choices"]] == planned
    for line in record["choices"]:
        assert all(len(line[name]) == len(line["seeds"]) for name in FIGURES)
    wanted = {line["choice"]["way"] for line in record["choices"]}
    shown = {way for t in table.TABLES if t.question == path.stem for way in t.rows}
    assert wanted == shown, "what was run should be shown"


def _line(way: str, rate: float, held_out: list[float], test: list[float]) -> dict[str, Any]:
    return {
        "choice": {"way": way, "lr": rate},
        "seeds": [0, 1, 2, 3][: len(test)],
        "validation_accuracy": held_out,
        "test_accuracy": test,
        "train_loss": [0.5, 3.0, None, 0.1][: len(test)],
    }


def test_the_rate_is_chosen_by_what_is_held_out() -> None:
    record = {
        "choices": [
            _line("a", 0.1, [0.5, 0.5, 0.6, 0.9], [0.9, 0.9, 0.9, 0.1]),
            _line("a", 0.2, [0.6, 0.5, 0.6], [0.3, 0.5, 0.7]),
            _line("b", 0.1, [0.6, 0.5, 0.6], [0.4, 0.6, 0.8]),
        ]
    }
    small = table.Table("t", "t", {}, {"all": {}, "none": {"sigma": 1}}, {"a": "a", "b": "a"})
    assert table.seeds(record) == [0, 1, 2]
    cell = table.best(small, record, "a", {})
    assert cell == table.Cell(rate=0.2, figures=(30.0, 50.0, 70.0), failed=2)
    assert table.best(small, record, "a", {"sigma": 1}) is None
    assert table.render(small, record).splitlines() == [
        "| | all | none |",
        "| --- | ---: | ---: |",
        "| a | 50.0 ± 20.0 at 0.2, 2 of 3 fail |  |",
        "| b | 60.0 ± 20.0 at 0.1, 2 of 3 fail; +10.0, p < 0.001 |  |",
    ]


def test_student_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in range(1, 12):
        for t in (-3.0, 0.0, 0.1, 1.0, 2.776, 40.0):
            expected = 2 * stats.t.sf(abs(t), freedom)
            assert math.isclose(two_sided(t, freedom), expected, rel_tol=1e-6, abs_tol=1e-12)
    pairs = ([1.0, 2.0, 4.0, 3.0], [0.5, 2.5, 3.0, 1.0])
    assert math.isclose(paired_p(*pairs), stats.ttest_rel(*pairs).pvalue)


def test_pairs_that_do_not_differ() -> None:
    assert paired_p([1.0, 2.0], [1.0, 2.0]) == 1
    assert paired_p([2.0, 3.0], [1.0, 2.0]) == 0


def test_the_picture_is_drawn(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    plot.draw(path, table.read(table.FOLDER / "scaled_start.json"))
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
