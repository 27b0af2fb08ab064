"""Print the README's table of what `python -m benchmarks.speed` measured, as markdown.

    python -m benchmarks.speed.table [JSON] [--plot PICTURE]

The JSON is the only source: table and picture can be made again without measuring.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks._environment import RESULTS
from benchmarks.speed.report import converge_markdown, markdown


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, draw the picture if asked to; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.table", description="Print a table of measured steps."
    )
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS / "speed.json")
    parser.add_argument("--plot", type=Path, metavar="PICTURE", help="needs matplotlib")
    options = parser.parse_args(arguments)
    try:
        record = json.loads(options.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not isinstance(record, dict) or not (record.get("step") or record.get("converge")):
        print(f"error: {options.file} holds no steps of benchmarks.speed", file=sys.stderr)
        return 2
    if record.get("step"):
        print(markdown(record))
    if record.get("converge"):
        print(("\n" if record.get("step") else "") + converge_markdown(record))
    if options.plot is not None:
        from benchmarks.speed.plot import draw

        draw(options.plot, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
