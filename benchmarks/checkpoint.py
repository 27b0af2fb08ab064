"""What `enorm-fx balance` costs on a large checkpoint: `python -m benchmarks.checkpoint`.

Writes a folder of transformers with a Llama of random weights (1 GB in float32, in shards), copies
it as a plain read and write, and balances it in a process of its own: seconds of both, and how much
more memory than its imports that process ever had. Pages of mapped files count, though the system
may take them back at any time. Prints the figures and writes checkpoint.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks._environment import RESULTS, environment, write_json
from benchmarks._memory import peak

SEED = 0
_IMPORTS = (
    "torch._dynamo", "torch.export", "torch.fx.experimental.proxy_tensor", "safetensors.torch",
    "rich.progress", "transformers.models.llama.modeling_llama", "enorm_fx.cli.main",
    "enorm_fx.analysis", "enorm_fx.balancing", "enorm_fx.checkpoints.checkpoint",
    "enorm_fx.checkpoints.running", "enorm_fx.verifying",
)  # fmt: skip
_CHUNK = 1 << 22  # bytes that the plain copy reads at once


def main(argv: Sequence[str] | None = None) -> int:
    """Write, copy, balance, print the figures, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--width", type=int, default=1024, help="hidden size (default: 1024)")
    parser.add_argument("--layers", type=int, default=14, help="(default: 14)")
    parser.add_argument("--folder", type=Path, help="where there is room (default: temporary)")
    parser.add_argument("--output", type=Path, default=RESULTS / "checkpoint.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child is not None:
        return _balance(options.child)
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        write_llama(folder / "in", options.width, options.layers)
        record = {
            "environment": environment(torch.device("cpu"), SEED),
            "width": options.width,
            "layers": options.layers,
            **measure(folder),
        }
    write_json(options.output, record)
    show(Console(), record)
    return 0


def write_llama(folder: Path, width: int, layers: int) -> None:
    """A folder with config.json and random float32 weights, one shard for each layer."""
    import transformers
    from safetensors.torch import save_file

    from enorm_fx.checkpoints.skeleton import parameters_on_meta, slots

    folder.mkdir()
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, vocab_size=16 * width,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with parameters_on_meta():
        model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(SEED)
    shards: dict[str, list[tuple[str, torch.Size]]] = {}
    for slot in slots(model):
        layer = slot.names[0].split(".layers.")[-1].split(".")[0]
        shard = f"model-{layer if layer.isdigit() else 'rest'}.safetensors"
        shards.setdefault(shard, []).append((slot.names[0], slot.tensor.shape))
    for shard, entries in shards.items():
        weights = {}
        for name, shape in entries:
            spread = torch.rand((), generator=generator).exp2().item() if len(shape) > 1 else 0.1
            weights[name] = torch.randn(shape, generator=generator) * spread * shape[-1] ** -0.5
            if len(shape) == 1:
                weights[name] += 1
        save_file(weights, folder / shard, metadata={"format": "pt"})
    places = {name: shard for shard, entries in shards.items() for name, _ in entries}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def measure(folder: Path, rounds: int = 2) -> dict[str, Any]:
    """Copy and balance `folder`/in, in turns: sizes in bytes, times in seconds."""
    shards = sorted((folder / "in").glob("*.safetensors"))
    size, largest = sum(p.stat().st_size for p in shards), max(p.stat().st_size for p in shards)
    copies, runs = [], []
    for _ in range(rounds):
        copies.append(_copy(shards, folder / "copy"))
        child = [sys.executable, "-m", "benchmarks.checkpoint", "--child", str(folder)]
        runs.append(json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout))
        shutil.rmtree(folder / "out")
    best = min(runs, key=lambda run: float(run["seconds"]))
    return {
        "bytes": size,
        "largest_shard": largest,
        "copy_seconds": sorted(copies),
        "runs": runs,
        "peak_beyond_imports": max(run["peak_beyond_imports"] for run in runs),
        "peak_per_byte": max(run["peak_beyond_imports"] for run in runs) / size,
        "seconds_per_copy": best["seconds"] / min(copies),
    }


def _copy(shards: Sequence[Path], folder: Path) -> float:
    """Seconds that reading and writing the files takes, until they are on the disk."""
    folder.mkdir()
    start = time.perf_counter()
    for shard in shards:
        with shard.open("rb") as source, (folder / shard.name).open("wb") as target:
            shutil.copyfileobj(source, target, _CHUNK)
            target.flush()
            os.fsync(target.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds


def _balance(folder: Path) -> int:
    """In a process of its own: balance, and print what it took as JSON."""
    import contextlib
    import io
    from importlib import import_module

    for name in _IMPORTS:
        import_module(name)
    before, start = peak(), time.perf_counter()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status: int = import_module("enorm_fx.cli.main").main(
            ["balance", f"hf:{folder / 'in'}", "--output", str(folder / "out"), "--json"]
        )
    seconds = time.perf_counter() - start
    report = json.loads(said.getvalue()) if status == 0 else {}
    kept = ("scales", "cycles", "norm_before", "norm_after", "verified")
    figures = {
        "seconds": seconds,
        "peak_beyond_imports": peak() - before,
        **{name: report.get(name) for name in kept},
    }
    print(json.dumps(figures))
    return status


def show(console: Console, record: dict[str, Any]) -> None:
    """The figures in three lines."""
    size = record["bytes"]
    console.print(f"checkpoint: {size / 1e9:.2f} GB, {record['layers'] + 1} shards")
    console.print(
        f"memory: {record['peak_beyond_imports'] / 1e9:.2f} GB beyond imports, "
        f"{record['peak_per_byte']:.2f} of the checkpoint"
    )
    console.print(
        f"time: {min(run['seconds'] for run in record['runs']):.1f} s, "
        f"{record['seconds_per_copy']:.1f} times one read and write "
        f"({min(record['copy_seconds']):.1f} s)"
    )


if __name__ == "__main__":
    sys.exit(main())
