"""The benchmark of a quantized Llama: its methods keep the function, its table tells losses."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks._environment import RESULTS
from benchmarks.quantize.llama import __main__ as benchmark
from benchmarks.quantize.llama import model as llama
from benchmarks.quantize.llama.methods import (
    GROUP,
    LARGER,
    METHODS,
    batches,
    listed_pairs,
    plan_of,
    smooth_listed_,
    with_outliers,
)
from benchmarks.quantize.llama.quantizers import SETTINGS, quantized
from benchmarks.quantize.llama.table import largest_error, losses, table
from benchmarks.quantize.table import spread

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """What `build` makes is tiny."""
    for name, size in SMALL.items():
        monkeypatch.setitem(llama.SIZES, name, size)
    monkeypatch.setattr(llama, "WINDOW", 12)
    monkeypatch.setattr(benchmark, "WINDOW", 12)
    monkeypatch.setattr(llama, "VOCABULARY", 300)


@pytest.fixture
def network(small):
    """An untrained one in float64 whose norms are not all ones, and what it is called with."""
    model = llama.build(0).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        scale = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(scale) if parameter.dim() == 1 else parameter.mul_(4)
    tokens = torch.randint(300, (10, 12), generator=generator)
    return model, batches(tokens)


def logits(model, calibration):
    return torch.cat([model(**batch).logits for batch in calibration])


def test_outliers_and_every_method_keep_the_function(network):
    model, calibration = network
    start = with_outliers(model, calibration, 0)
    expected = logits(model, calibration)
    torch.testing.assert_close(logits(start, calibration), expected)
    for name, method in METHODS.items():
        done = copy.deepcopy(start)
        method(done, calibration)
        torch.testing.assert_close(logits(done, calibration), expected)
        pairs = zip(done.parameters(), start.parameters(), strict=True)
        assert all(map(torch.equal, *zip(*pairs, strict=True))) == (name == "plain")


def test_outliers_are_one_channel_in_a_hundred_of_each_group_and_seeds_differ(network):
    model, calibration = network
    starts = [with_outliers(model, calibration, seed) for seed in (0, 1)]
    for norm in ("model.layers.0.input_layernorm.weight", "model.norm.weight"):
        ratios = [start.get_parameter(norm) / model.get_parameter(norm) for start in starts]
        for ratio in ratios:
            torch.testing.assert_close(ratio.sort().values[-2:], ratio.new_tensor([1.0, LARGER]))
        assert not torch.equal(*ratios)


def test_smoothing_by_the_list_makes_activations_as_large_as_weights(network):
    model, calibration = network
    smooth_listed_(model, calibration)
    pairs = listed_pairs(model)
    seen = []
    for norm, _ in pairs:
        norm.register_forward_hook(lambda m, x, y: seen.append(y.abs().flatten(0, 1).amax(0)))
    logits(model, calibration)
    for number, (_, readers) in enumerate(pairs):
        x = torch.stack(seen[number :: len(pairs)]).amax(0)
        w = torch.cat([reader.weight for reader in readers]).abs().amax(0)
        torch.testing.assert_close(x, w)


def test_the_list_is_what_the_plan_finds_but_for_the_head(network):
    model, calibration = network
    names = {module: name for name, module in model.named_modules()}
    listed = [(names[n], [names[r] for r in readers]) for n, readers in listed_pairs(model)]
    found = plan_of(model, calibration).smoothing_pairs("smoothquant")
    assert [(p.smooth_layer, p.balance_layers) for p in found] == [
        *listed, ("model.norm", ["lm_head"])
    ]  # fmt: skip


def test_losses_are_those_of_the_model_and_a_guess_costs_the_log_of_the_tokens(network):
    model, calibration = network
    windows = torch.cat([batch["input_ids"] for batch in calibration])
    found = llama.losses(model, windows)
    assert found.shape == (len(windows),)
    assert float(model(input_ids=windows, labels=windows).loss) == pytest.approx(found.mean())
    assert found.std() > 0
    model.lm_head.weight.zero_()
    torch.testing.assert_close(llama.losses(model, windows), torch.full_like(found, math.log(300)))


def a_record(ours):
    found = {"plain": 20.0, "SmoothQuant, listed": 18.0, "ours, p = 2": ours}
    rows = {
        state: {m: [{"float": 16.0, "error": 0.001, "W8A8": w}] * count for m, w in found.items()}
        for state, count in (("as trained", 1), ("outliers", 2))
    }
    return {"settings": ["W8A8"], "quantized": rows}


def test_a_loss_is_told_and_a_win_is_not():
    assert losses(a_record(17.9), "ours, p = 2") == []
    assert losses(a_record(19.8), "ours, p = 2") == [
        "W8A8, as trained: 10.00% above SmoothQuant, listed",
        "W8A8, outliers: 10.00% above SmoothQuant, listed",
    ]
    shown = "| W8A8 | outliers | 16.00 ± 0.00 | 20.00 ± 0.00 | 18.00 ± 0.00 | 17.90 ± 0.00 |"
    assert shown in table(a_record(17.9))
    assert largest_error(a_record(17.9)) == pytest.approx(0.1)
    assert spread([17.5], 1.0, 2) == "17.50"
    assert spread([1.0, 3.0], 1.0, 2) == "2.00 ± 1.41"


def test_a_run_trains_once_writes_its_record_and_takes_it_from_the_cache(
    small, tmp_path, monkeypatch, capsys
):
    text = "".join(f"{n} {'and' if n % 3 else 'the'} {n * n}\n" for n in range(400))
    (tmp_path / "text").write_text(text)
    monkeypatch.setattr(benchmark, "quantized", lambda model, setting: copy.deepcopy(model))
    monkeypatch.setattr(benchmark, "_torchao", lambda: "none")
    few = {name: METHODS[name] for name in ("plain", "ours, p = 2")}
    monkeypatch.setattr(benchmark, "METHODS", few)
    out = tmp_path / "quantize.json"
    command = ["--text", str(tmp_path / "text"), "--cache", str(tmp_path / "cache")]
    command += ["--steps", "24", "--seeds", "2", "--windows", "4", "--output", str(out)]
    threads = torch.get_num_threads()
    try:
        assert benchmark.main(command) == 0
        record = json.loads(out.read_text(encoding="utf-8"))
        monkeypatch.setattr(llama, "train_", None)  # a second run trains nothing
        monkeypatch.setattr(benchmark, "measure", None)  # and measures nothing
        assert benchmark.main(command) == 0
    finally:
        torch.set_num_threads(threads)
    assert json.loads(out.read_text(encoding="utf-8"))["quantized"] == record["quantized"]
    assert table(record) in capsys.readouterr().out
    assert record["held_out_tokens"] == 4 * 12
    for state, count in (("as trained", 1), ("outliers", 2)):
        for method in few:
            found = record["quantized"][state][method]
            assert len(found) == count
            assert all(set(f) == {"float", "error", *SETTINGS} for f in found)
            first = record["quantized"]["as trained"]["plain"][0]["float"]
            assert all(f["float"] == pytest.approx(first, rel=1e-4) for f in found)
            assert 1 < first < math.inf


@pytest.mark.parametrize(("setting", "levels"), [("W8A8", 256), ("W4A16", 16)])
def test_torchao_quantizes_all_layers_but_the_head(setting, levels):
    pytest.importorskip("torchao")
    model = llama.build(0).eval().requires_grad_(False)
    done = quantized(model, setting)
    assert torch.equal(done.lm_head.weight, model.lm_head.weight)
    for name, module in done.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.dequantize()
            before = model.model.get_submodule(name).weight
            rows = weight if setting == "W8A8" else weight.reshape(-1, GROUP)
            assert all(len(row.unique()) <= levels for row in rows)
            assert not torch.equal(weight, before)
            assert (weight - before).abs().max() < before.abs().max() / (levels / 4)


def test_the_table_in_the_documentation_is_that_of_the_record():
    record = json.loads((RESULTS / "quantize-llama.json").read_text(encoding="utf-8"))
    docs = Path(__file__).parents[2] / "docs" / "results.md"
    text = docs.read_text(encoding="utf-8")
    assert table(record) in text
    assert f"at most {largest_error(record):.2f}%" in text
