"""The tables of `quantize-llama.json`: `python -m benchmarks.quantize.llama.table`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._environment import RESULTS
from benchmarks.quantize.llama.methods import OTHERS
from benchmarks.quantize.table import spread

AS_TRAINED, OUTLIERS = "as trained", "outliers"


def perplexities(record: Mapping[str, Any], state: str, method: str, setting: str) -> list[float]:
    """A figure for each drawing of outliers, one as trained."""
    return [found[setting] for found in record["quantized"][state][method]]


def table(record: Mapping[str, Any]) -> str:
    """A table in Markdown: perplexity, mean and deviation over the drawings."""
    names = list(record["quantized"][AS_TRAINED])
    lines = [
        "| | | float | " + " | ".join(names) + " |",
        "| --- | --- " + "| ---: " * (len(names) + 1) + "|",
    ]
    for setting in record["settings"]:
        for state in record["quantized"]:
            cells = [_shown(perplexities(record, state, "plain", "float"))]
            cells += [_shown(perplexities(record, state, name, setting)) for name in names]
            lines.append(f"| {setting} | {state} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(values: Sequence[float]) -> str:
    return spread(values, unit=1.0, digits=2)


def largest_error(record: Mapping[str, Any]) -> float:
    """Of all standard errors of what a quantization does to the loss, in percent of perplexity."""
    cells = (row for methods in record["quantized"].values() for row in methods.values())
    return 100 * max(float(found["error"]) for row in cells for found in row)


def losses(record: Mapping[str, Any], method: str) -> list[str]:
    """Where a method's mean perplexity is above the best of the others', in percent of it."""
    found = []
    for setting in record["settings"]:
        for state in record["quantized"]:
            means = {
                name: statistics.mean(perplexities(record, state, name, setting))
                for name in (*OTHERS, method)
            }
            best = min(OTHERS, key=means.__getitem__)
            above = 100 * (means[method] / means[best] - 1)
            if above > 0:
                found.append(f"{setting}, {state}: {above:.2f}% above {best}")
    return found


def main() -> int:
    """Print the table of the committed record, and where ours loses."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "quantize-llama.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    print(table(record))
    print(f"\nstandard errors: {largest_error(record):.2f}% at most")
    for method in record["quantized"][AS_TRAINED]:
        if method not in OTHERS:
            print(f"\n{method} loses")
            print("\n".join(losses(record, method)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
