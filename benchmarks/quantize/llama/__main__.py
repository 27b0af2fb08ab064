"""How well a small Llama quantizes: `python -m benchmarks.quantize.llama --text FILE --cache DIR`.

It is trained on a text, and quantized by torchao (which must be installed) as trained and with
outliers: channels that are 30 times as large, what reads them divided, so that its function stays;
plain, and after each method of `methods`. Perplexity is that of windows of the text that are held
out. The figures are of the King James Bible, Debian's bible-kjv, which prints it:
`echo Genesis1:1-Revelation22:21 | bible -f > FILE`. Trained weights and finished parts stay under
`--cache`, so that a run that is stopped goes on. Writes quantize-llama.json.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._environment import RESULTS, environment, write_json
from benchmarks.quantize.llama import methods
from benchmarks.quantize.llama.methods import METHODS, batches, with_outliers
from benchmarks.quantize.llama.model import BATCH, WINDOW, losses, read, trained
from benchmarks.quantize.llama.quantizers import SETTINGS, quantized
from benchmarks.quantize.llama.table import AS_TRAINED, OUTLIERS, table

TRAINED = 0  # the seed of the first weights and of the windows that are drawn
CALIBRATION = 32  # windows of the training text


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, write the JSON and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize.llama")
    parser.add_argument("--text", type=Path, required=True, help="a file of text")
    parser.add_argument("--cache", type=Path, required=True, help="for weights and records")
    parser.add_argument("--steps", type=int, default=2_000, help="of training")
    parser.add_argument("--seeds", type=int, default=5, help="drawings of outliers")
    parser.add_argument("--windows", type=int, default=384, help="held out")
    parser.add_argument("--output", type=Path, default=RESULTS / "quantize-llama.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    text = read(options.text, options.cache)
    model = trained(text, TRAINED, options.steps, options.cache)
    held_out = _spread(text.held_out, options.windows)
    windows = text.train[: len(text.train) // WINDOW * WINDOW].reshape(-1, WINDOW)
    calibration = batches(_spread(windows, CALIBRATION))
    starts = {AS_TRAINED: [model]}
    starts[OUTLIERS] = [with_outliers(model, calibration, seed) for seed in range(options.seeds)]
    record: dict[str, Any] = {
        "environment": {**environment(torch.device("cpu"), TRAINED), "torchao": _torchao()},
        "text_sha256": hashlib.sha256(options.text.read_bytes()).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": options.steps * BATCH * WINDOW,
        "calibration_tokens": CALIBRATION * WINDOW,
        "held_out_tokens": held_out.numel(),
        "larger": methods.LARGER,
        "share": methods.SHARE,
        "drawings": options.seeds,
        "settings": list(SETTINGS),
        "quantized": {state: {method: [] for method in METHODS} for state in starts},
    }
    for state, models in starts.items():
        for method, found in record["quantized"][state].items():
            for number, start in enumerate(models):
                stem = f"{state}-{method}-{number}-{options.steps}-{options.windows}"
                kept = options.cache / f"{stem}.json"
                if not kept.is_file():
                    done = copy.deepcopy(start)
                    METHODS[method](done, calibration)
                    write_json(kept, measure(done, held_out))
                found.append(json.loads(kept.read_text(encoding="utf-8")))
    write_json(options.output, record)
    print(table(record))
    return 0


def measure(model: Any, windows: Tensor) -> dict[str, float]:
    """Perplexity in float and with every setting of the quantization.

    error: the largest standard error, over the windows, of what a quantization does to the loss.
    """
    float_losses = losses(model, windows)
    found = {"float": math.exp(float_losses.mean()), "error": 0.0}
    for setting in SETTINGS:
        quantized_losses = losses(quantized(model, setting), windows)
        found[setting] = math.exp(quantized_losses.mean())
        error = float((quantized_losses - float_losses).std()) / math.sqrt(len(windows))
        found["error"] = max(found["error"], error)
    return found


def _spread(windows: Tensor, count: int) -> Tensor:
    """So many of the windows, evenly spread."""
    return windows[:: max(1, len(windows) // count)][:count]


def _torchao() -> str:
    import torchao

    return str(torchao.__version__)


if __name__ == "__main__":
    sys.exit(main())
