"""The demo: figures that are finite and repeatable, a picture, and an undisturbed caller."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import enorm_fx
from enorm_fx.demo import run as demo
from enorm_fx.errors import ArgumentError, EnormError

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def _run(folder: Path, epochs: int = 2) -> tuple[demo.Runs, str]:
    text = io.StringIO()
    console = Console(file=text, width=80)
    runs = demo.run(console, folder / "demo.png", epochs=epochs, seed=3)
    return runs, text.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def outcome(folder: Path) -> tuple[demo.Runs, str]:
    return _run(folder)


def _all(runs: demo.Runs) -> tuple[demo.Training, ...]:
    return (*runs.badly_scaled, *runs.ordinary)


def _figures(runs: demo.Runs) -> list[object]:
    return [
        (run.train_loss, run.diverged_in, run.test_accuracy, *run.norms_before.values())
        for run in _all(runs)
    ]


def test_without_enorm_the_badly_scaled_network_diverges_and_only_it(
    outcome: tuple[demo.Runs, str],
) -> None:
    alone, *trained = _all(outcome[0])
    assert alone.diverged_in is not None
    assert alone.train_loss == ()
    for run in trained:
        assert run.diverged_in is None
        assert len(run.train_loss) == 2
        figures = (*run.train_loss, run.test_accuracy, *run.norms_after.values())
        assert all(math.isfinite(figure) and figure > 0 for figure in figures)
        assert 0 <= run.enorm_seconds < run.seconds


def test_with_enorm_the_start_does_not_matter(outcome: tuple[demo.Runs, str]) -> None:
    """Both begin at the same optimum, up to rounding."""
    runs, _ = outcome
    one, other = runs.badly_scaled[1], runs.ordinary[1]
    assert one.train_loss[0] == pytest.approx(other.train_loss[0], rel=1e-3)
    assert max(one.norms_before.values()) > 10 * max(other.norms_before.values())


def test_each_pair_of_runs_starts_alike_and_ends_apart(outcome: tuple[demo.Runs, str]) -> None:
    runs, _ = outcome
    for without, with_enorm in (runs.badly_scaled, runs.ordinary):
        assert without.norms_before == with_enorm.norms_before
        assert without.norms_after != with_enorm.norms_after


def test_enorm_balances_both_convolutions_of_a_block(outcome: tuple[demo.Runs, str]) -> None:
    """Of the scales that touch block1, those between its convolutions come last in a cycle."""
    norms = outcome[0].ordinary[1].norms_after
    assert norms["block1.conv1"] == pytest.approx(norms["block1.conv2"], rel=0.02)


@pytest.mark.usefixtures("outcome")
def test_picture_is_a_png(folder: Path) -> None:
    from matplotlib.image import imread

    picture = folder / "demo.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(picture)
    assert pixels.shape[:2] == (660, 1950)
    assert pixels.std() > 0.05, "the picture is blank"


def test_output_shows_the_two_lines_and_every_pair(outcome: tuple[demo.Runs, str]) -> None:
    runs, text = outcome
    assert "enorm = enorm_fx.ENorm(model, optimizer)" in text
    assert "enorm.step()" in text
    assert "One run each" in text
    assert "…" not in text  # nothing is cut in a terminal of 80 columns
    plan = enorm_fx.analyze(demo.DigitReader(), torch.zeros(2, 1, 8, 8))
    assert f"{len(plan.direct_pairs)} rescalable pairs, {plan.num_scales} free scales" in text
    for pair in plan.direct_pairs:
        assert pair.producer.removesuffix(".weight") in text
        assert pair.consumer.removesuffix(".weight") in text
    alone, *trained = _all(runs)
    assert f"diverges │ step {alone.diverged_in}" in text
    for run in trained:
        assert f"{run.test_accuracy:.2%}" in text
        assert f"{math.hypot(*run.norms_after.values()):.4g}" in text


def test_same_seed_same_figures_and_the_callers_settings_are_kept(
    outcome: tuple[demo.Runs, str], tmp_path: Path
) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    again, _ = _run(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert _figures(again) == _figures(outcome[0])


def test_a_model_of_the_demo_reads_digits() -> None:
    model = demo.DigitReader()
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert sum(parameter.ndim > 1 for parameter in model.parameters()) == 11


@pytest.mark.parametrize(
    ("name", "epochs", "message"),
    [
        ("demo.png", 0, "epochs must be 1 or more, not 0"),
        ("demo.svg", 1, r"must end in \.png"),
        ("missing/demo.png", 1, "is no folder"),
    ],
)
def test_bad_arguments_are_refused_before_training(
    tmp_path: Path, name: str, epochs: int, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        demo.run(Console(file=io.StringIO()), tmp_path / name, epochs=epochs)


@pytest.mark.parametrize(("module", "name"), [("sklearn", "scikit-learn"), ("matplotlib",) * 2])
def test_missing_extra_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EnormError, match=rf"needs {name}: pip install 'enorm-fx\[demo\]'"):
        demo.run(Console(file=io.StringIO()), tmp_path / "demo.png")


def test_import_loads_no_extra() -> None:
    code = (
        "import sys, enorm_fx.demo;"
        "print(sorted({'sklearn', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
