"""What a user should know once is in the log "enorm_fx", once, and nowhere else by default."""

from __future__ import annotations

import logging
import math
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from enorm_fx import ENorm, analyze
from enorm_fx.errors import NonFiniteError
from tests.support.helpers import BACKENDS, weights
from tests.support.three_layers import step, three_layers


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [r for r in caplog.records if r.name == "enorm_fx"]
    assert all(r.levelno == logging.INFO for r in records)
    return [r.getMessage() for r in records]


def train(model: nn.Module, steps: int = 3, **settings: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    fused = settings.get("fused", False)
    enorm = ENorm(analyze(model), optimizer, **settings)
    for _ in range(steps):
        step(model, optimizer)
        if not fused:
            enorm.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("other", [{}, {"order": "alternating"}, {"fused": True}])
def test_which_backend_runs_is_said_once(
    backend: str, other: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "enorm_fx"):
        train(three_layers(), start="as_is", backend=backend, **other)
    assert told(caplog) == [f"ENorm's steps run by backend '{backend}'"]


def test_why_adafactor_is_stepped_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    model = three_layers()
    optimizer = torch.optim.Adafactor(model.parameters())
    enorm = ENorm(analyze(model), optimizer, start="as_is")
    step(model, optimizer)
    with caplog.at_level(logging.INFO, "enorm_fx"):
        enorm.step()
    (message,) = told(caplog)
    assert message.startswith("ENorm's steps run by backend 'eager': the optimizer keeps means")


def test_the_start_says_its_largest_factor(caplog: pytest.LogCaptureFixture) -> None:
    model = three_layers()
    with torch.no_grad():
        model[0].weight[0] *= 1000
        model[2].weight[:, 0] /= 1000
    old = weights(model)
    with caplog.at_level(logging.INFO, "enorm_fx"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        enorm = ENorm(analyze(model), optimizer)
        step(model, optimizer)
    changes = [(w / old[n]).log().abs().max() for n, w in weights(model).items()]
    (message,) = [m for m in told(caplog) if "balanced" in m]
    figure = float(re.search(r"was ([\d.e+]+)$", message)[1])  # type: ignore[index]
    assert figure == pytest.approx(math.exp(float(max(changes))), rel=1e-2)
    assert figure > 10
    assert enorm.state_dict()["started"]


def test_groups_that_are_left_out_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "enorm_fx"):
        ENorm(three_layers(), last_layer=False)
        ENorm(three_layers())
        frozen = three_layers()
        frozen[0].weight.requires_grad_(False)
        ENorm(frozen)
    out = [m for m in told(caplog) if "backend" not in m]
    assert out == [
        "ENorm moves 1 of 2 groups: 1 would move a last weight (last_layer=False)",
        "ENorm leaves alone what frozen parameters hold fast: '0.weight' "
        "(analyze with frozen='rescale' moves them too)",
    ]


def test_a_refused_step_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = three_layers()
    enorm = ENorm(analyze(model), start="as_is")
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    with caplog.at_level(logging.INFO, "enorm_fx"):
        for _ in range(3):
            with pytest.raises(NonFiniteError):
                enorm.step()
    refused = [m for m in told(caplog) if "refused" in m]
    assert len(refused) == 1
    assert "'2.weight' has 1 entries that are not finite" in refused[0]


def test_nothing_is_printed_by_default() -> None:
    code = (
        "from tests.support.three_layers import *; import enorm_fx\n"
        "model = three_layers(); optimizer = torch.optim.SGD(model.parameters(), lr=0.01)\n"
        "enorm = enorm_fx.ENorm(model, optimizer, last_layer=False, backend='eager')\n"
        "step(model, optimizer); enorm.step()"
    )
    quiet, loud = (
        subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True)
        for before in ("", "import logging; logging.basicConfig(level='INFO')\n")
    )
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    assert loud.stderr.count("INFO:enorm_fx:ENorm") == 3
