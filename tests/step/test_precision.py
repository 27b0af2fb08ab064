"""No setting of the user's reaches the arithmetic of a step, and each is left as it was."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """
import torch
from enorm_fx.step.precision import full_precision
matmuls = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
{setting}
before = [m.fp32_precision for m in matmuls]
with full_precision(torch.device("cpu")):
    inside = [m.fp32_precision for m in matmuls]
assert [m.fp32_precision for m in matmuls] == before, before
assert all(p in ("none", "ieee") for p in inside), inside
{after}
print("kept", *before)
"""


@pytest.mark.parametrize(
    ("setting", "after", "before"),
    [
        ("", "assert torch.get_float32_matmul_precision() == 'highest'", "none none"),
        (
            "torch.set_float32_matmul_precision('medium')",
            "assert torch.get_float32_matmul_precision() == 'medium'",
            "tf32 bf16",
        ),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "", "tf32 none"),
        ("torch.backends.fp32_precision = 'tf32'", "", "tf32 tf32"),
    ],
    ids=["default", "older functions", "newer ones", "all backends"],
)
def test_precision_is_full_inside_and_the_users_outside(
    setting: str, after: str, before: str
) -> None:
    """In a process each: torch does not let the two ways of setting it be mixed."""
    script = _SCRIPT.format(setting=setting, after=after)
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["kept", *before.split()]
