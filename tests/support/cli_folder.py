"""A folder full of targets for the command line, and how the tests call it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from enorm_fx.cli.main import main

NET = Path(__file__).with_name("cli_net.py").read_text()

FILES = {
    "net.py": NET,
    "imports.py": "import there_is_no_such_module",
    "syntax.py": "def f(:\n",
    "quits.py": "raise SystemExit('bye')",
    "raises.py": "class E(Exception): pass\nraise E('at import')",
    "nulls.py": "\0",
    "user.py": "from helper_of_user import Net",
    "helper_of_user.py": NET,
    "notes.txt": "no Python",
    "json.py": NET,
    "records.py": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "from torch import nn\n@dataclass\nclass Size:\n    width: int = 4\n"
    "def make(): return nn.Sequential(nn.Linear(3, Size().width), nn.ReLU(), nn.Linear(4, 2))",
    "package_of_nets/__init__.py": "",
    "package_of_nets/nets.py": NET,
}


@contextmanager
def filled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder with the files above, as working directory."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    known = set(sys.modules)
    yield folder
    for name in set(sys.modules) - known:
        if name.startswith(("package_of_nets", "helper_of_user", "enorm_fx_target_")):
            del sys.modules[name]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command."""
    status = main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def error_line(err: str) -> str:
    """The one line that the command wrote; the target's own prints are not counted."""
    prints = ("importing the net", "running the net")
    lines = [line for line in err.splitlines() if line not in prints]
    assert len(lines) == 1, err
    assert lines[0].startswith("enorm-fx: error: ")
    return lines[0]
