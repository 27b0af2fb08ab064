"""What a command imports before it has work to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import enorm_fx


def imported_by(*argv: str) -> set[str]:
    """The top-level modules that a command imports, in a process of its own."""
    code = (
        "import json, sys\n"
        "from enorm_fx.cli.main import main\n"
        "status = main(sys.argv[1:])\n"
        "print('\\n' + json.dumps([status, *sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True, text=True, check=True, cwd=Path(enorm_fx.__file__).parents[1],
    )  # fmt: skip
    status, *modules = json.loads(done.stdout.splitlines()[-1])
    assert status == 0
    return {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["--version"], ["analyze", "--help"], ["smooth", "--help"], ["demo", "--help"],
     ["ops"], ["ops", "--json"]],
)  # fmt: skip
def test_no_torch_before_there_is_work(argv: list[str]) -> None:
    assert not imported_by(*argv) & {"torch", "numpy", "networkx", "matplotlib"}


def test_a_command_that_needs_torch_is_seen(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("import torch\nnet = torch.nn.Linear(2, 2)\n")
    assert "torch" in imported_by("analyze", f"{tmp_path / 'net.py'}:net")
