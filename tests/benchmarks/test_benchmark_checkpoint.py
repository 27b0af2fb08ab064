"""The checkpoint benchmark on a tiny Llama: figures are there, and its folder is a real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("transformers")

from benchmarks import checkpoint


def test_it_writes_a_folder_that_fits_and_measures_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.write_llama(tmp_path / "in", width=64, layers=2)
    index = json.loads((tmp_path / "in" / "model.safetensors.index.json").read_text())
    shards = {"model-0.safetensors", "model-1.safetensors", "model-rest.safetensors"}
    assert set(index["weight_map"].values()) == shards
    found = checkpoint.measure(tmp_path, rounds=1)
    size = sum((tmp_path / "in" / shard).stat().st_size for shard in shards)
    assert found["bytes"] == size > 4 * 64 * 64 * 16 * 2
    assert found["largest_shard"] < size
    [run] = found["runs"]
    assert run["verified"]["float64_change"] < 1e-12
    assert run["norm_after"] < run["norm_before"]
    assert 0 < run["peak_beyond_imports"] == found["peak_beyond_imports"]
    assert found["seconds_per_copy"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    checkpoint.show(Console(), {**found, "layers": 2})
    assert "3 shards" in capsys.readouterr().out


def test_the_same_weights_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        checkpoint.write_llama(tmp_path / name, width=64, layers=1)
    files = [(tmp_path / n / "model-0.safetensors").read_bytes() for n in ("a", "b")]
    assert files[0] == files[1]
