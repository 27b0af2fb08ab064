"""Weights that lie in parts on several processes: the step is the one that one process makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from enorm_fx.step.shards import digest
from tests.support.sharded import REFUSALS, cases, run

ROUNDING = {"torch.float64": 1e-12, "torch.float32": 1e-6}


def _trains_as_one_process_does(size: int, processes: list[dict[str, Any]]) -> None:
    for name, *_, dtype in cases(size):
        results = [process[name] for process in processes]
        assert all(isinstance(result, float) for result in results), results[0]
        assert max(results) <= ROUNDING[str(dtype)], name
        assert len(set(results)) == 1, name


def test_four_processes_step_as_one_does(tmp_path: Path) -> None:
    _trains_as_one_process_does(4, run(4, tmp_path))


def test_two_processes_step_as_one_does_or_not_at_all(tmp_path: Path) -> None:
    """One test, since starting processes takes longer than all that they do here."""
    first, second = processes = run(2, tmp_path)
    _trains_as_one_process_does(2, processes)
    for process in processes:
        assert isinstance(process["balance"], float), process["balance"]
        assert process["balance"] <= 1e-12
        # FSDP2 leaves gathered weights in the outermost module then; they are no longer read.
        assert process["after an evaluation"] == "as it should"
        assert process["data parallel"] == "the same bits"

    # What is wrong in one process is said there, and no process writes.
    assert first["nothing"] == second["nothing"] == ""
    assert "not finite in the part of another process" in first["NaN in one part"]
    assert "'up.weight' has 1 entries that are not finite" in second["NaN in one part"]
    assert "another process cannot make this step" in first["storage freed in one process"]
    assert "its storage holds 0" in second["storage freed in one process"]
    for process in processes:
        assert "weights were not the same" in process["replicated weight changed in one process"]
    assert len(REFUSALS) == 4

    # Collectives have their own errors.
    assert first["the other process is gone"] in ("RuntimeError", "DistBackendError")


def test_different_numbers_have_different_digests() -> None:
    """Processes compare them; one bit, an order or a sign must not get lost."""
    numbers = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    seen = {int(digest(numbers)), int(digest(numbers.flip(0))), int(digest(-numbers))}
    for place in range(50):
        other = numbers.clone()
        other[place] *= 1 + 2**-52
        seen.add(int(digest(other)))
    assert len(seen) == 53
