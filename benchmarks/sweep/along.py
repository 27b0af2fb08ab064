"""What does the optimizer undo between two steps? `python -m benchmarks.sweep.along`.

One network is trained with ENorm in several ways and without it. At some steps, after the
optimizer's step and again after ENorm's, a copy is brought to the optimum: how far the norm, the
scales and the balance of each unit were from it. Writes benchmarks/results/sweep/along.json.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import enorm_fx
from benchmarks._environment import RESULTS, environment, write_json
from benchmarks._training import Trainer, batches, learning_rate, weight_norm
from benchmarks.sweep.__main__ import Place, as_settings
from benchmarks.sweep.questions import ALONG
from benchmarks.train import prepare, prepare_data

STEPS = (1, 4, 16, 64, 192)
MEASURES = ("norm", "excess", "largest_log_scale", "gap")
_TOLERANCE = 1e-6


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep.along", description=__doc__)
    add = parser.add_argument
    add("--data-path", type=Path, help="folder of Fashion-MNIST's files")
    add("--seeds", type=int, default=5)
    add("--output", type=Path, default=RESULTS / "sweep" / "along.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    place = Place("cpu", {"fashion-mnist": options.data_path}, {})
    runs = [
        {"choice": choice, "seed": seed, "steps": list(measured(choice, seed, place))}
        for seed in range(options.seeds)
        for choice in ALONG
    ]
    record = {
        "benchmark": "along", "environment": environment(torch.device("cpu"), 0),
        "steps": STEPS, "runs": runs,
    }  # fmt: skip
    write_json(options.output, record)
    print(f"written: {options.output}")
    return 0


def measured(choice: Mapping[str, Any], seed: int, place: Place) -> Iterator[dict[str, Any]]:
    """What `distance` gives after the optimizer's step and after ENorm's, at some steps."""
    settings = as_settings(choice, place)
    data = prepare_data(settings, torch.device("cpu"))
    trainer, _ = prepare(settings, data, seed)
    twin = copy.deepcopy(trainer.model)
    plan = enorm_fx.analyze(twin, data.train_images[:2])
    number = 0
    for epoch in range(settings.epochs):
        for group in trainer.optimizer.param_groups:
            group["lr"] = learning_rate(settings.lr, epoch, settings.epochs)
        order = torch.randperm(len(data.train_labels), generator=trainer.generator)
        for batch in batches(order, settings.batch_size):
            number += 1
            _optimizer_step(trainer, batch)
            before = distance(trainer.model, twin, plan) if number in STEPS else None
            if trainer.balancer is not None:
                trainer.balancer.step()
            if before is not None:
                after = distance(trainer.model, twin, plan)
                yield {"step": number, "before": before, "after": after}


def _optimizer_step(trainer: Trainer, batch: torch.Tensor) -> None:
    data = trainer.data
    loss = F.cross_entropy(trainer.model(data.train_images[batch]), data.train_labels[batch])
    trainer.optimizer.zero_grad()
    torch.autograd.backward(loss)
    trainer.optimizer.step()


def distance(model: nn.Module, twin: nn.Module, plan: enorm_fx.Plan) -> dict[str, float]:
    """From the optimum, all groups included; the twin takes the weights and is balanced.

    norm: l_2 of all weights. excess: by how much J is above its least, as a part of that.
    largest_log_scale: |log d| to the optimum. gap: the largest |P - N| / (P + N) before balancing.
    """
    twin.load_state_dict(model.state_dict())
    gap = max(group.gap for group in enorm_fx.imbalance(plan).groups)
    report = enorm_fx.balance(plan, tol=_TOLERANCE)
    return {
        "norm": weight_norm(model),
        "excess": report.norm_before / report.norm_after - 1,
        "largest_log_scale": report.largest_log_scale,
        "gap": gap,
    }


if __name__ == "__main__":
    sys.exit(main())
