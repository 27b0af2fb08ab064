"""One JSON file a question: a line for each choice, with a list of figures, seed by seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.sweep.questions import Choice
from enorm_fx.errors import ArgumentError

FIGURES = (
    "validation_accuracy", "validation_loss", "test_accuracy", "test_loss", "train_loss",
    "weight_norm", "seconds_per_epoch", "enorm_share",
)  # fmt: skip
# What must be the same for figures to stand in one table.
SAME = ("cpu", "device", "device_name", "threads", "torch", "enorm_fx")


@dataclass(slots=True)
class Store:
    """The figures of one question: by choice and seed, None where one was not finite.

    options: what every run has instead of what its choice says. Only choices that are in the plan
    are kept and written.
    """

    path: Path
    question: str
    choices: Iterable[Choice]
    environment: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    runs: dict[tuple[str, int], dict[str, float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.is_file():
            return
        record = json.loads(self.path.read_text(encoding="utf-8"))
        other = [k for k in SAME if record["environment"].get(k) != self.environment.get(k)]
        other += ["options"] if record["options"] != self.options else []
        if other:
            raise ArgumentError(
                f"{self.path} was measured otherwise ({', '.join(other)} differ): finish it in the "
                "same way, or move the file away"
            )
        planned = {key(choice) for choice in self.choices}
        for line in record["choices"]:
            name = key(line["choice"])
            for place, seed in enumerate(line["seeds"]):
                if name in planned:
                    self.runs[name, seed] = {f: line[f][place] for f in FIGURES}

    def write(self) -> None:
        """Everything so far, complete or not at all."""
        lines = []
        for choice in self.choices:
            seeds = sorted(seed for name, seed in self.runs if name == key(choice))
            if seeds:
                figures = {f: [self.runs[key(choice), s][f] for s in seeds] for f in FIGURES}
                lines.append(json.dumps({"choice": choice, "seeds": seeds, **figures}))
        head = {
            "benchmark": "sweep",
            "question": self.question,
            "environment": self.environment,
            "options": self.options,
            "choices": [],
        }
        text = json.dumps(head, indent=1, allow_nan=False)
        text = text.replace('"choices": []', '"choices": [\n' + ",\n".join(lines) + "\n]")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(self.path)


def key(choice: Choice) -> str:
    """A choice as one string, the same for equal choices."""
    return json.dumps(choice, sort_keys=True)
