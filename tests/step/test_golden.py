"""One step after another, entry by entry, against what the authors' released code produced.

Each file of tests/data holds the weights of a chain before and after 1, 2 and 10 steps, for
convolutions the momentum too, and in `meta` the settings.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from enorm_fx.enorm import ENorm
from tests.support.plans import Case, chain

FILES = sorted((Path(__file__).parents[1] / "data").glob("*.npz"))
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Golden:
    """Tensors by "when/name"."""

    kind: str
    widths: list[int]
    c: float
    p: float
    momentum: float
    steps: list[int]
    tensors: dict[str, Tensor]

    def at(self, when: str) -> dict[str, Tensor]:
        return {
            key.split("/", 1)[1]: value
            for key, value in self.tensors.items()
            if key.split("/", 1)[0] == when
        }


def read(path: Path) -> Golden:
    with np.load(path) as file:
        meta = json.loads(str(file["meta"]))
        tensors = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
    return Golden(**meta, tensors=tensors)


def build(golden: Golden) -> tuple[Case, torch.optim.SGD]:
    """The chain with the file's weights, and SGD with the file's momentum."""
    before = golden.at("before")
    kernels = [w.shape[-1] if w.ndim == 4 else 1 for w in before.values()]
    case = chain(golden.widths, kind=golden.kind, bias=False, kernels=kernels)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1, momentum=golden.momentum)
    momentum = golden.at("before_momentum")
    with torch.no_grad():
        for name, parameter in case.model.named_parameters():
            parameter.copy_(before[name])
            if momentum:
                optimizer.state[parameter]["momentum_buffer"] = momentum[name].clone()
    return case, optimizer


def largest_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """max over all entries of |actual - expected| / max |expected of that tensor|."""
    if actual.keys() != expected.keys() or not expected:
        raise ValueError(f"names differ: {sorted(actual)}, {sorted(expected)}")
    return max(
        float(
            ((actual[name] - expected[name]).abs() / expected[name].abs().max())
            .nan_to_num(nan=math.inf)
            .max()
        )
        for name in expected
    )


def _check_steps(golden: Golden, order: str) -> float:
    case, optimizer = build(golden)
    enorm = ENorm(
        case.plan,
        optimizer,
        c=golden.c,
        p=golden.p,
        order=order,
        last_layer=False,
        start="as_is",
    )
    worst = 0.0
    for step in range(1, max(golden.steps) + 1):
        enorm.step()
        if step in golden.steps:
            weights = {name: p.detach() for name, p in case.model.named_parameters()}
            worst = max(worst, largest_error(weights, golden.at(f"after{step}")))
            if momentum := golden.at(f"after{step}_momentum"):
                buffers = {
                    name: optimizer.state[p]["momentum_buffer"]
                    for name, p in case.model.named_parameters()
                }
                worst = max(worst, largest_error(buffers, momentum))
    return worst


def test_there_are_files() -> None:
    assert {path.stem for path in FILES} == {"conv_c1.1_momentum", "fc_c1", "fc_c1.2", "fc_p1"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_simultaneous_order_gives_what_the_authors_code_gave(path: Path) -> None:
    golden = read(path)
    assert golden.steps == [1, 2, 10]
    assert _check_steps(golden, "simultaneous") <= TOLERANCE


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_comparison_notices_another_order(path: Path) -> None:
    assert _check_steps(read(path), "sequential") > 1e-3


def test_the_comparison_notices_one_wrong_entry() -> None:
    right = {"w": torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3)}
    wrong = {"w": right["w"].clone()}
    wrong["w"][1, 1] *= 1 + 1e-11
    assert largest_error(right, right) == 0
    assert largest_error(wrong, right) > TOLERANCE
    wrong["w"][1, 1] = math.nan
    assert largest_error(wrong, right) == math.inf
    with pytest.raises(ValueError, match="names differ"):
        largest_error({}, right)
