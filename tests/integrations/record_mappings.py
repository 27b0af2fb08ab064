"""Write down which modules llm-compressor's own mappings name in tiny models.

    python -m tests.integrations.record_mappings

needs llmcompressor; the file that it writes is all that the tests need.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.base import get_layer_mappings_from_model as awq
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.smoothquant.base import (
    get_layer_mappings_from_model as smoothquant,
)
from torch import nn

from tests.support.language_models import NAMES, build

FILE = Path(__file__).parents[1] / "data" / "llmcompressor_mappings.json"

Pairs = list[tuple[str, list[str]]]


def smoothquant_pairs(model: nn.Module, mappings: Any = None) -> Pairs:
    """(smooth layer, balance layers) as the modifier finds them."""
    modifier = SmoothQuantModifier(mappings=mappings or smoothquant(model), ignore=[])
    names = {module: name for name, module in model.named_modules()}
    return [
        (found.smooth_name, [names[layer] for layer in found.balance_layers])
        for found in modifier._resolve_mappings(model)
    ]


def awq_pairs(model: nn.Module, mappings: Any = None) -> Pairs:
    """The same for the other modifier, which asks that some layer is to be quantized."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.quantization_scheme = None  # type: ignore[assignment]
    modifier = AWQModifier(mappings=mappings or awq(model))
    modifier._set_resolved_mappings(model)
    return [(found.smooth_name, found.balance_names) for found in modifier._resolved_mappings]


def recorded(name: str, make: Callable[[str], nn.Module] = build) -> dict[str, Pairs | None]:
    """By method what the library's own mappings find in a model; None where they do not fit it."""
    found: dict[str, Pairs | None] = {}
    for method, pairs in (("smoothquant", smoothquant_pairs), ("awq", awq_pairs)):
        try:
            found[method] = pairs(make(name))
        except (ValueError, RuntimeError):
            found[method] = None
    return found


def main() -> None:
    """Write the file."""
    versions = {p: importlib.metadata.version(p) for p in ("llmcompressor", "transformers")}
    mappings = {name: recorded(name) for name in NAMES}
    text = json.dumps({"versions": versions, "mappings": mappings}, indent=1)
    FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
