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


def _run(folder: Path, name: str = "demo.png", seed: int = 3) -> tuple[demo.DemoResult, str]:
    text = io.StringIO()
    console = Console(file=text, width=120)
    return demo.run(console, folder / name, epochs=2, seed=seed), text.getvalue()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[demo.DemoResult, str]:
    return _run(tmp_path_factory.mktemp("demo"))


def _figures(training: demo.Training) -> list[float]:
    return [
        *training.train_loss,
        training.test_accuracy,
        *training.norms_before.values(),
        *training.norms_after.values(),
    ]


def test_figures_are_finite(outcome: tuple[demo.DemoResult, str]) -> None:
    result, _ = outcome
    for training in (result.without, result.with_enorm):
        assert len(training.train_loss) == 2
        assert all(math.isfinite(figure) and figure > 0 for figure in _figures(training))
        assert 0 < training.test_accuracy <= 1
        assert 0 <= training.enorm_seconds < training.seconds
    assert result.without.enorm_seconds == 0 < result.with_enorm.enorm_seconds


def test_both_start_alike_and_end_apart(outcome: tuple[demo.DemoResult, str]) -> None:
    result, _ = outcome
    assert result.without.norms_before == result.with_enorm.norms_before
    assert result.without.norms_after != result.with_enorm.norms_after


def test_enorm_balances_both_convolutions_of_a_block(
    outcome: tuple[demo.DemoResult, str],
) -> None:
    """Of the scales that touch block1, those between its convolutions come last in a cycle."""
    norms = outcome[0].with_enorm.norms_after
    assert norms["block1.conv1"] == pytest.approx(norms["block1.conv2"], rel=0.02)


def test_picture_is_a_png(outcome: tuple[demo.DemoResult, str]) -> None:
    from matplotlib.image import imread

    picture = outcome[0].picture
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(picture)
    assert pixels.shape[:2] == (660, 1650)
    assert pixels.std() > 0.05, "the picture is blank"


def test_output_shows_the_two_lines_and_every_pair(outcome: tuple[demo.DemoResult, str]) -> None:
    result, text = outcome
    assert "enorm = enorm_fx.ENorm(model, optimizer)" in text
    assert "enorm.step()" in text
    assert "One run each" in text
    plan = enorm_fx.analyze(demo.DigitReader(), torch.zeros(2, 1, 8, 8))
    assert f"{len(plan.direct_pairs)} rescalable pairs, {plan.num_scales} free scales" in text
    assert "leaves out the 32 scales that move the last weight (head)" in " ".join(text.split())
    for pair in plan.direct_pairs:
        assert pair.producer.removesuffix(".weight") in text
        assert pair.consumer.removesuffix(".weight") in text
    for training in (result.without, result.with_enorm):
        assert f"{training.test_accuracy:.2%}" in text
        assert f"{math.hypot(*training.norms_after.values()):.2f}" in text


def test_same_seed_same_figures_and_the_callers_settings_are_kept(
    outcome: tuple[demo.DemoResult, str], tmp_path: Path
) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    again, _ = _run(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert _figures(again.without) == _figures(outcome[0].without)
    assert _figures(again.with_enorm) == _figures(outcome[0].with_enorm)


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
