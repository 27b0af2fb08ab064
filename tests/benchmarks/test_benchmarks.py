"""The training benchmark: models, schedule, and records that add up."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import enorm_fx
from benchmarks import data, train, train_summary
from benchmarks._environment import environment, write_json
from benchmarks._settings import default_name, parse_arguments
from benchmarks._timing import Stopwatch
from benchmarks._training import batches, evaluate, learning_rate, weight_norm
from benchmarks.data import reduced
from benchmarks.models import (
    NORMS,
    Transformer,
    fully_connected,
    fully_convolutional,
    residual,
    vgg,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The models are too small for more; threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- models ----


def _weights(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in model.parameters() if parameter.ndim > 1]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n_layers", [1, 15])
def test_fully_connected(n_layers: int, norm: str) -> None:
    model = fully_connected(3072, n_layers, 10, norm=norm)
    assert _weights(model) == [(500, 3072), *[(500, 500)] * n_layers, (10, 500)]
    vectors = 2 * 500 * (n_layers + 1) if norm != "none" else 0
    expected = 3072 * 500 + n_layers * 500 * 500 + 500 * 10 + vectors
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert sum(isinstance(module, nn.ReLU) for module in model) == n_layers + 1
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("norm", NORMS)
def test_fully_convolutional(norm: str) -> None:
    model = fully_convolutional(3, 10, norm=norm)
    shapes = [(128, 3, 3, 3), *[(128, 128, 3, 3)] * 2, (256, 128, 3, 3), *[(256, 256, 3, 3)] * 2]
    shapes += [(320, 256, 3, 3), (320, 320, 1, 1), (10, 320, 1, 1)]
    assert _weights(model) == shapes
    vectors = 2 * (3 * 128 + 3 * 256 + 2 * 320) if norm != "none" else 0
    expected = sum(math.prod(shape) for shape in shapes) + vectors
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert sum(isinstance(module, nn.ReLU) for module in model) == 8
    assert isinstance(model[-3], nn.Conv2d), "nothing but the average may follow the last weight"


@pytest.mark.parametrize("size", [8, 28, 32])
def test_fully_convolutional_takes_every_data_sets_images(size: int) -> None:
    model = fully_convolutional(1, 10, norm="bn").eval()
    assert model(torch.zeros(1, 1, size, size)).shape == (1, 10)


def test_weights_are_drawn_by_he() -> None:
    for parameter in fully_connected(784, 2, 10).parameters():
        assert parameter.std().item() == pytest.approx(math.sqrt(2 / parameter.shape[1]), rel=0.05)


@pytest.mark.parametrize("norm", NORMS)
def test_residual(norm: str) -> None:
    model = residual(1, 10, norm=norm, width=4)
    shapes = [(4, 1, 3, 3), *[(4, 4, 3, 3)] * 4, (8, 4, 3, 3), (8, 8, 3, 3), (8, 4, 1, 1)]
    assert _weights(model) == [*shapes, *[(8, 8, 3, 3)] * 2, (10, 8)]
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [8, 28, 32])
def test_vgg(norm: str, size: int) -> None:
    model = vgg(3, 10, norm=norm, width=4).eval()
    shapes = [(4, 3, 3, 3), (4, 4, 3, 3), (8, 4, 3, 3), (8, 8, 3, 3), (16, 32), (10, 16)]
    assert _weights(model) == shapes
    x = torch.randn(2, 3, size, size)
    assert model(x).shape == (2, 10)
    plan = enorm_fx.analyze(model, x, batchnorm="affine")
    assert plan.num_scales == 4 + 4 + 8 + 8 + 16


def test_a_transformer_sees_nothing_of_what_follows() -> None:
    torch.manual_seed(0)
    model = Transformer(8, 5, n_layers=2, width=16)
    text = torch.randint(5, (1, 8))
    other = text.clone()
    other[0, 5] = (other[0, 5] + 1) % 5
    before, after = model(text), model(other)
    assert before.shape == (1, 5, 8)
    same = (before == after).all(1)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


# ---- training loop ----


def test_learning_rate_falls_linearly_to_zero() -> None:
    rates = torch.tensor([learning_rate(0.1, epoch, 10) for epoch in range(11)])
    torch.testing.assert_close(rates, torch.linspace(0.1, 0, 11))


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(10, 5, [5, 5]), (11, 5, [5, 5]), (12, 5, [5, 5, 2]), (3, 1, [1, 1, 1]), (1, 5, [1])],
)
def test_batches(count: int, size: int, sizes: list[int]) -> None:
    cut = batches(torch.arange(count), size)
    assert [len(batch) for batch in cut] == sizes
    assert torch.cat(cut).tolist() == list(range(sum(sizes)))


def test_weight_norm_counts_weights_alone() -> None:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
    assert weight_norm(model) == pytest.approx(5)


def test_evaluate_goes_through_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks._training.EVALUATION_BATCH", 100)
    digits = data.load("digits", None, CPU)
    torch.manual_seed(0)
    model = fully_connected(64, 1, 10)
    logits = model(digits.test_images)
    loss, accuracy = evaluate(model, digits)
    expected = nn.functional.cross_entropy(logits, digits.test_labels).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert accuracy == (logits.argmax(1) == digits.test_labels).double().mean().item()


def test_stopwatch_adds_up_and_starts_again() -> None:
    watch = Stopwatch(CPU)
    assert watch.read() == 0
    for _ in range(2):
        with watch:
            sum(range(1000))
    assert watch.read() > 0
    assert watch.read() == 0


# ---- records ----

SHORT = ["--dataset", "digits", "--n-layers", "1", "--epochs", "2", "--batch-size", "128"]
TIMES = ("seconds", "enorm_share")


def _train(folder: Path, *options: str, name: str = "record.json") -> dict[str, Any]:
    output = folder / "new" / name
    assert train.main([*SHORT, *options, "--output", str(output)]) == 0
    record: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return record


def _figures(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in epoch.items() if key not in TIMES}
        for run in record["runs"]
        for epoch in run["epochs"]
    ]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _train(tmp_path_factory.mktemp("train"), "--enorm", "1.2", "--n-iter", "2")


def test_record_adds_up(record: dict[str, Any]) -> None:
    assert record["benchmark"] == "train"
    assert record["arguments"]["enorm"] == 1.2
    assert record["model"]["weights"] == 3
    assert record["model"]["parameters"] == 64 * 500 + 500 * 500 + 500 * 10 + 4 * 500
    assert record["model"]["pairs"] == 2
    assert record["model"]["num_scales"] == 1000
    runs, summary = record["runs"], record["summary"]
    assert [run["seed"] for run in runs] == [0, 1]
    accuracies = [run["epochs"][-1]["test_accuracy"] for run in runs]
    assert [run["final_accuracy"] for run in runs] == accuracies
    assert summary["final_accuracy_mean"] == pytest.approx(statistics.mean(accuracies))
    assert summary["final_accuracy_std"] == pytest.approx(statistics.stdev(accuracies))
    assert (summary["runs"], summary["diverged"]) == (2, 0)


def test_record_of_each_epoch(record: dict[str, Any]) -> None:
    for run in record["runs"]:
        epochs = run["epochs"]
        assert [epoch["epoch"] for epoch in epochs] == [1, 2]
        assert [epoch["learning_rate"] for epoch in epochs] == [0.1, 0.05]
        assert epochs[1]["train_loss"] < epochs[0]["train_loss"]
        assert all(0 < epoch["enorm_share"] < 1 for epoch in epochs)
        assert all(epoch["weight_norm"] > 0 for epoch in epochs)
        correct = [epoch["test_accuracy"] * 360 for epoch in epochs]
        assert correct == pytest.approx([round(count) for count in correct])
    first, second = (run["epochs"][-1]["train_loss"] for run in record["runs"])
    assert first != second, "every run should have its own seed"


def test_same_seed_same_figures(record: dict[str, Any], tmp_path: Path) -> None:
    before = torch.get_rng_state()
    again = _train(tmp_path, "--enorm", "1.2", "--seed", "1")
    assert torch.equal(torch.get_rng_state(), before)
    assert _figures(again) == _figures(record)[2:]


@pytest.mark.parametrize(
    "options",
    [["--norm", "none"], ["--momentum", "0.9"], ["--optimizer", "adamw", "--lr", "0.001"]],
)
def test_without_enorm(tmp_path: Path, options: list[str]) -> None:
    plain = _train(tmp_path, *options)
    assert "pairs" not in plain["model"]
    assert all(epoch["enorm_share"] == 0 for epoch in plain["runs"][0]["epochs"])
    assert plain["summary"]["final_accuracy_std"] is None


def test_half_precision_changes_little_and_only_the_training(tmp_path: Path) -> None:
    options = ("--norm", "none", "--enorm", "1", "--width", "16")
    full, half = (_train(tmp_path, *options, *amp) for amp in ((), ("--amp",)))
    assert half["arguments"] == full["arguments"] | {"amp": True}
    losses = [record["runs"][0]["epochs"][0]["train_loss"] for record in (full, half)]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_run_is_resumed_and_a_finished_one_is_kept(tmp_path: Path) -> None:
    whole = _train(tmp_path, "--n-iter", "2", name="whole.json")
    _train(tmp_path, "--n-iter", "1", name="stopped.json")
    resumed = _train(tmp_path, "--n-iter", "2", "--resume", name="stopped.json")
    assert _figures(resumed) == _figures(whole)
    assert resumed["arguments"] == whole["arguments"]
    path = tmp_path / "new" / "stopped.json"
    kept = path.read_text(encoding="utf-8")
    assert train.main([*SHORT, "--lr", "1", "--resume", "--output", str(path)]) == 2
    assert path.read_text(encoding="utf-8") == kept


def test_what_is_held_out_is_measured(tmp_path: Path) -> None:
    options = ("--validation", "100", "--width", "16", "--pool", "2", "--images", "600")
    record = _train(tmp_path, *options)
    assert record["data"] == {
        "image_shape": [1, 4, 4], "train_images": 500, "test_images": 360, "augmented": False,
    }  # fmt: skip
    for epoch in record["runs"][0]["epochs"]:
        assert 0 < epoch["validation_accuracy"] < 1
        assert epoch["validation_loss"] > 0


@pytest.mark.parametrize("once", [False, True])
def test_a_badly_scaled_start_is_the_same_function(once: bool) -> None:
    words = [*SHORT, "--width", "16", "--norm", "none"]
    digits = reduced(data.load("digits", None, CPU), images=None, pool=1, validation=0)
    plain, _ = train.prepare(parse_arguments(words), digits, 3)
    words += ["--sigma", "1", *(["--balance-once"] if once else [])]
    scaled, _ = train.prepare(parse_arguments(words), digits, 3)
    with torch.no_grad():
        images = digits.test_images
        torch.testing.assert_close(plain.model(images), scaled.model(images), rtol=1e-4, atol=1e-4)
    norms = (weight_norm(plain.model), weight_norm(scaled.model))
    assert norms[1] < norms[0] if once else norms[1] > norms[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer", "adamw", "--momentum", "0.9"], "--momentum belongs to sgd"),
        (["--model-type", "transformer"], "the transformer reads text"),
        (["--validation", "1437"], "--validation 1437 leaves none of 1437 images"),
        (["--pool", "9"], "--pool 9 does not fit digits"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], message: str
) -> None:
    path = tmp_path / "record.json"
    assert train.main([*SHORT, *options, "--output", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("enorm", ["0", "1"])
def test_divergence_is_recorded(tmp_path: Path, enorm: str) -> None:
    wild = ["--norm", "none", "--lr", "1e6", "--n-iter", "2", "--enorm", enorm]
    diverged = _train(tmp_path, *wild)
    assert diverged["summary"]["diverged"] == 2
    for run in diverged["runs"]:
        assert run["diverged"]
        assert len(run["epochs"]) == 1, "the remaining epochs should be skipped"
        assert run["epochs"][0]["train_loss"] is None
        assert 0 <= run["final_accuracy"] <= 1


def test_environment_tells_machine_and_versions() -> None:
    described = environment(CPU, 7)
    assert described["seed"] == 7
    assert described["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert described["cores"] >= 1
    assert described["cpu"]


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    write_json(path, {"a": [math.nan, 1.5, (math.inf, "x")], "b": {"c": -math.inf, "d": None}})
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written == {"a": [None, 1.5, [None, "x"]], "b": {"c": None, "d": None}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "0 is not 1 or more"),
        (["--enorm", "-1"], "not a finite number of 0 or more"),
        (["--lr", "inf"], "not a finite number of 0 or more"),
        (["--dataset", "imagenet"], "invalid choice"),
    ],
)
def test_command_line_refuses_bad_values(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main([*SHORT, *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_command_line_reports_an_unusable_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*SHORT, "--device", "nowhere"]) == 2
    assert "--device nowhere cannot be used here" in capsys.readouterr().err


def test_default_names_tell_configurations_apart() -> None:
    names = {
        default_name(parse_arguments([*SHORT, "--enorm", enorm, "--norm", norm]))
        for enorm in ("0", "1", "1.2")
        for norm in ("bn", "none")
    }
    assert len(names) == 6
    assert "train-digits-linear1-nobn-enorm1.2" in names


# ---- summary ----


def test_summary_prints_a_table_and_draws(
    record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    _train(tmp_path, "--norm", "none", "--lr", "1e6")
    write_json(tmp_path / "new" / "good.json", record)
    capsys.readouterr()
    files = [str(path) for path in sorted((tmp_path / "new").iterdir())]
    picture = tmp_path / "picture.png"
    assert train_summary.main([*files, "--plot", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    rate = record["arguments"]["lr"]
    assert lines[2].startswith(f"| digits | linear, 1 | bn | {rate:g} | 1.2 | 2 | ")
    assert f"{record['summary']['final_accuracy_mean']:.2%} ± " in lines[2]
    assert "| none | 1e+06 | off |" in lines[3]
    assert "not finite" in lines[3]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_summary_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}", encoding="utf-8")
    assert train_summary.main([str(path)]) == 2
    assert f"{path} is no result of benchmarks.train" in capsys.readouterr().err
