"""The benchmark of quantization: its methods keep the function, its tables tell losses."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks._environment import RESULTS
from benchmarks.data import Dataset
from benchmarks.quantize import __main__ as benchmark
from benchmarks.quantize import rounding
from benchmarks.quantize.methods import METHODS, applied, pairwise_, rescaled
from benchmarks.quantize.networks import BUILDERS, build, fold_, neighbours
from benchmarks.quantize.quantizers import SETTINGS, quantized
from benchmarks.quantize.table import losses, spread, table


def network(name):
    """An untrained network whose residual blocks do something, in float64, and images."""
    model = fold_(build(name, 0)).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    images = torch.randn(6, 1, 28, 28, generator=generator, dtype=torch.float64)
    return model, images


@pytest.mark.parametrize("name", BUILDERS)
def test_every_method_and_the_rescaling_keep_the_function(name):
    model, images = network(name)
    start = rescaled(model, images[:2], 0)
    assert not torch.allclose(next(model.parameters()), next(start.parameters()))
    for method in METHODS:
        (done,) = applied(method, name, [start], images)
        torch.testing.assert_close(done(images), model(images))


def test_pairwise_equalization_balances_each_channel_and_finds_the_hand_written_pairs():
    model, images = network("mobilenet")
    before = model(images)
    pairs = neighbours(model)
    assert len(pairs) == 8
    pairwise_(pairs)
    for producer, consumer in pairs:
        depthwise = consumer.groups != 1
        leaving = consumer.weight if depthwise else consumer.weight.transpose(0, 1)
        torch.testing.assert_close(
            producer.weight.flatten(1).abs().amax(1),
            leaving.flatten(1).abs().amax(1),
            rtol=1e-3,
            atol=0,
        )
    torch.testing.assert_close(model(images), before)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_quantized_weight_has_no_more_levels_than_its_bits(setting):
    model = fold_(build("mlp", 0)).requires_grad_(False)
    images = torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    copied = quantized(model, SETTINGS[setting], images)
    weight = copied[1].weight
    levels = 2 ** SETTINGS[setting].bits - 1
    rows = weight if SETTINGS[setting].channels else weight.reshape(1, -1)
    assert all(len(row.unique()) <= levels for row in rows)
    assert not torch.equal(weight, model[1].weight)
    assert (weight - model[1].weight).abs().max() <= model[1].weight.abs().max() / (levels - 1)
    assert not torch.equal(copied(images), model(images))


def a_record(ours):
    found = {"plain": 0.5, "ours, p = 2": ours}
    rows = {
        state: {m: [{"float": 0.9, "W4": w4}] * count for m, w4 in found.items()}
        for state, count in (("as trained", 1), ("rescaled", 2))
    }
    return {"records": [{"network": "mlp", "quantized": rows}]}


def test_a_loss_is_told_and_a_win_is_not():
    assert losses(a_record(0.6), "ours, p = 2", ["W4"]) == []
    assert losses(a_record(0.4), "ours, p = 2", ["W4"]) == [
        "W4, mlp, as trained: 10.00 below plain",
        "W4, mlp, rescaled: 10.00 below plain",
    ]
    assert "| mlp | rescaled | 90.0 ± 0.0 | 50.0 ± 0.0 | 40.0 ± 0.0 |" in table(
        a_record(0.4), ["W4"]
    )
    assert spread([0.5]) == "50.0"
    assert spread([0.5, 0.52]) == "51.0 ± 1.4"


def test_a_run_trains_once_writes_its_record_and_takes_it_from_the_cache(
    tmp_path, monkeypatch, capsys
):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(600, 1, 28, 28, generator=generator), torch.arange(600) % 10
    data = Dataset("noise", images, labels, images[:40], labels[:40], 10, False)
    monkeypatch.setattr(benchmark, "load", lambda *args: data)
    out = tmp_path / "quantize.json"
    command = ["--only", "mlp", "--seeds", "2", "--images", "40"]
    command += ["--cache", str(tmp_path / "cache"), "--output", str(out)]
    threads = torch.get_num_threads()
    try:
        assert benchmark.main(command) == 0
        record = json.loads(out.read_text(encoding="utf-8"))
        monkeypatch.setattr(benchmark, "trained", None)  # a second run trains nothing
        assert benchmark.main(command) == 0
    finally:
        torch.set_num_threads(threads)
    assert json.loads(out.read_text(encoding="utf-8"))["records"] == record["records"]
    assert table(record) in capsys.readouterr().out
    (row,) = record["records"]
    for state, count in (("as trained", 1), ("rescaled", 2)):
        for method in METHODS:
            found = row["quantized"][state][method]
            assert [f["float"] for f in found] == [row["float"]] * count
            assert all(set(f) == {"float", *SETTINGS} for f in found)


def test_the_table_in_the_documentation_is_that_of_the_record():
    record = json.loads((RESULTS / "quantize.json").read_text(encoding="utf-8"))
    docs = Path(__file__).parents[2] / "docs" / "results.md"
    assert table(record) in docs.read_text(encoding="utf-8")


def test_roundings_are_of_one_function_and_their_table_has_what_was_measured(
    tmp_path, monkeypatch, capsys
):
    model, images = network("mobilenet")
    first, second = rounding.moved(model, images, 2)
    assert not torch.equal(first[0].conv.weight, second[0].conv.weight)
    torch.testing.assert_close(first[0].conv.weight, model[0].conv.weight, rtol=0.15, atol=0)
    for copied in (first, second):
        torch.testing.assert_close(copied(images), model(images))
    data = Dataset("noise", images, torch.arange(6), images, torch.arange(6), 10, False)
    monkeypatch.setattr(rounding, "load", lambda *args: data)
    monkeypatch.setattr(rounding, "trained", lambda *args: model)
    monkeypatch.setattr(rounding, "METHODS", ("pairwise", "ours, p = 2"))
    out = tmp_path / "rounding.json"
    command = ["--trainings", "1", "--roundings", "2", "--cache", "none", "--output", str(out)]
    threads = torch.get_num_threads()
    try:
        assert rounding.main(command) == 0
    finally:
        torch.set_num_threads(threads)
    record = json.loads(out.read_text(encoding="utf-8"))
    assert rounding.table(record) in capsys.readouterr().out
    (found,) = record["trainings"]
    assert {m: len(values) for m, values in found["methods"].items()} == dict.fromkeys(
        rounding.METHODS, 3
    )
    trainings = [{"float": 0.9, "methods": {"pairwise": values}}
                 for values in ([0.5, 0.6, 0.8], [0.7, 0.7, 0.7])]  # fmt: skip
    shown = rounding.table({"trainings": trainings})
    assert "| 0 | 90.0 | 50.0; 70.0 ± 14.1 |" in shown
    assert "| all | 90.0 ± 0.0 | 60.0 ± 14.1; 70.0 ± 0.0 |" in shown


def test_the_table_of_roundings_in_the_documentation_is_that_of_the_record():
    record = json.loads((RESULTS / "quantize-rounding.json").read_text(encoding="utf-8"))
    docs = Path(__file__).parents[2] / "docs" / "results.md"
    assert rounding.table(record) in docs.read_text(encoding="utf-8")
