"""Bytes that a step sends between processes where weights lie in parts, beside gradients.

Counted from a plan on the meta device, not run: each rank contributes one vector of channels for
each side of a group, once a cycle, and a few numbers for what all must agree on.

    python -m benchmarks.wire
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

import enorm_fx
from benchmarks._environment import RESULTS, environment, write_json
from enorm_fx import Plan
from enorm_fx.step.layout import GroupLayout, make_layout

_SUM = 4  # bytes: sums of float32 weights are float32
_DECISIONS = 2 * 3 * 8  # bytes: two agreements on three int64
_BOUND = 8  # bytes: one float64 a weight


def bytes_of_a_step(plan: Plan, order: str = "colored", cycles: int = 1) -> dict[str, Any]:
    """What one rank hands to reductions in a step, if every weight lies in parts, and how often."""
    layout = make_layout(plan, plan.groups, torch.device("cpu"), order)
    in_parts = [
        len(block.shape) == 2 and block.removed is None and block.picked is None
        for block in layout.blocks
    ]
    vectors = sum(_positions(group, in_parts) for group in layout.groups)
    gathered = {b.entry for b, parts in zip(layout.blocks, in_parts, strict=True) if not parts}
    whole = sum(math.prod(layout.entries[entry].cells) for entry in gathered)
    sent = cycles * vectors * _SUM + whole * _SUM + len(layout.entries) * _BOUND + _DECISIONS
    gradients = 4 * sum(p.numel() for p in plan.model.parameters())
    return {
        "parameters": gradients // 4,
        "scales": plan.num_scales,
        "reductions": cycles * len(layout.batches) + 4,
        "bytes": sent,
        "gradient_bytes": gradients,
        "ratio": sent / gradients,
    }


def _positions(group: GroupLayout, in_parts: list[bool]) -> int:
    """Of all touches whose block is in parts; those of one side travel as one vector."""
    sides: dict[float, int] = {}
    for touch in group.touches:
        if in_parts[touch.block]:
            span = touch.positions
            size = span.stop - span.start if isinstance(span, slice) else len(span)
            sides[touch.coefficient] = sides.get(touch.coefficient, 0) + size
    return sum(min(size, group.channels) for size in sides.values())


def _resnet50() -> Plan:
    from torchvision.models import resnet50

    with torch.device("meta"):
        model = resnet50()
    return enorm_fx.analyze(model, torch.empty(2, 3, 224, 224, device="meta"))


def _llama_7b() -> Plan:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(LlamaConfig(use_cache=False))  # the defaults are 7B's
    tokens = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    return enorm_fx.analyze(model, {"input_ids": tokens})


MODELS = {"resnet50": _resnet50, "Llama 7B": _llama_7b}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "wire.json")
    output = parser.parse_args(arguments).output
    rows = {name: bytes_of_a_step(make()) for name, make in MODELS.items()}
    for name, row in rows.items():
        print(
            f"{name}: {row['bytes']:,} bytes in {row['reductions']} reductions, "
            f"{row['ratio']:.4%} of the gradients' {row['gradient_bytes']:,}"
        )
    where = environment(torch.device("meta"), seed=0)
    write_json(output, {"environment": where, "models": rows})


if __name__ == "__main__":
    main()
