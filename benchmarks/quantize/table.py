"""The tables of `benchmarks/results/quantize.json`: `python -m benchmarks.quantize.table`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._environment import RESULTS
from benchmarks.quantize.quantizers import SETTINGS

AS_TRAINED, RESCALED = "as trained", "rescaled"
OURS = ("ours, p = inf", "ours, p = 2", "ours, smooth")
SHOWN = ("W8A8 tensor", "W4 tensor", "W4 channel", "W4A8 channel")


def accuracies(record: Mapping[str, Any], network: str, state: str, method: str, setting: str
) -> list[float]:  # fmt: skip
    """Accuracy of one method on one network: a figure for each rescaling, one as trained."""
    return [
        found[setting]
        for row in record["records"]
        if row["network"] == network
        for found in row["quantized"][state][method]
    ]


def cases(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every network, as trained and rescaled, in the order of the record."""
    return [(row["network"], state) for row in record["records"] for state in row["quantized"]]


def methods(record: Mapping[str, Any]) -> list[str]:
    """Plain first, other libraries' methods, then ours."""
    found = list(record["records"][0]["quantized"][AS_TRAINED])
    return [m for m in found if m not in OURS] + [m for m in found if m in OURS]


def table(record: Mapping[str, Any], settings: Sequence[str] = SHOWN) -> str:
    """A table in Markdown for each setting: percent, mean and deviation over rescalings."""
    names = methods(record)
    parts = []
    for setting in settings:
        lines = [
            f"**{setting}**",
            "",
            "| network | | float | " + " | ".join(names) + " |",
            "| --- | --- " + "| ---: " * (len(names) + 1) + "|",
        ]
        for network, state in cases(record):
            cells = [spread(accuracies(record, network, state, "plain", "float"))]
            cells += [spread(accuracies(record, network, state, m, setting)) for m in names]
            lines.append(f"| {network} | {state} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def spread(values: Sequence[float], unit: float = 0.01, digits: int = 1) -> str:
    """Mean ± sample standard deviation (a single value alone), in percent if not told otherwise."""
    figures = [statistics.mean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]
    return " ± ".join(f"{figure / unit:.{digits}f}" for figure in figures)


def losses(record: Mapping[str, Any], method: str, settings: Sequence[str]) -> list[str]:
    """Where a method's mean is below the best of plain and the other libraries', by points."""
    others = [name for name in methods(record) if name not in OURS]
    found = []
    for setting in settings:
        for network, state in cases(record):
            means = {
                name: statistics.mean(accuracies(record, network, state, name, setting))
                for name in (*others, method)
            }
            best = max(others, key=lambda name: means[name])
            points = 100 * (means[best] - means[method])
            if points > 0:
                found.append(f"{setting}, {network}, {state}: {points:.2f} below {best}")
    return found


def main() -> int:
    """Print the tables of the committed record, and where ours loses."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "quantize.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    print(table(record))
    for method in OURS:
        print(f"\n{method} loses")
        print("\n".join(losses(record, method, tuple(SETTINGS))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
