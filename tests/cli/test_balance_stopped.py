"""`enorm-fx balance` that cannot be, or is stopped: all of the output or nothing."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from enorm_fx.cli.main import main
from tests.support.broken_files import BROKEN
from tests.support.checkpoint_files import FORMATS, contents, read
from tests.support.killed import killed_at_every_stage, killed_at_random, with_room_for

CODE = """
import torch
from torch import nn

def build(width=16):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 40), nn.ReLU(),
                         nn.Linear(40, 3))

def tied():
    made = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    made[2].weight = made[0].weight
    return made

def loses():
    made = build()
    made[0].register_forward_hook(lambda *_: 1 / 0)
    return made
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 3)
    )
    with torch.no_grad():
        made[0].weight.mul_(20)
    return made.state_dict()


def run(checkpoint: Path | str, output: Path | str, *options: str, target: str = "build") -> int:
    return main(
        ["balance", f"net.py:{target}", "--checkpoint", str(checkpoint), "--output", str(output),
         *options]
    )  # fmt: skip


def _with(**changes: Tensor | None) -> Callable[[Path], Path]:
    """The right weights but for some; None: without it."""

    def make(folder: Path) -> Path:
        state = {**weights(), **{n.replace("_", ".", 1): t for n, t in changes.items()}}
        return FORMATS["safetensors"](folder, {n: t for n, t in state.items() if t is not None})

    return make


def _untied(folder: Path) -> Path:
    state = {f"{i}.{n}": torch.ones(4, 4) * i for i in (1, 3) for n in ("weight",)}
    named = {"0.weight": state["1.weight"], "2.weight": state["3.weight"]}
    return FORMATS["zipped"](folder, {**named, "0.bias": torch.ones(4), "2.bias": torch.ones(4)})


# How IN is made, options, and what is said.
CASES: dict[str, tuple[Callable[[Path], Path], list[str], str]] = {
    "shape": (_with(**{"2_weight": torch.ones(40, 15)}), [], "'2.weight' has the shape (40, 15)"),
    "missing": (_with(**{"2_weight": None}), [], "lacks '2.weight'"),
    "extra": (
        _with(**{"6_weight": torch.ones(2)}),
        [],
        "'6.weight', which the model does not have",
    ),
    "nan": (_with(**{"2_bias": torch.full((40,), torch.nan)}), [], "'2.bias' in /"),
    "inf": (_with(**{"4_weight": torch.full((3, 40), torch.inf)}), [], "are not finite"),
    "whole numbers": (_with(**{"2_weight": torch.ones(40, 16).int()}), [], "'2.weight' is "),
    "a norm": (_with(), ["--p", "0.5"], "p must be a number >= 1 or inf, not 0.5"),
    "no norm": (_with(), ["--p", "two"], "argument --p: invalid float value: 'two'"),
    "output in itself": (_with(), ["--output", "one.safetensors"], "is the input"),
    "output is a folder": (_with(), ["--output", "."], "is a folder: name a file"),
    "no such folder": (_with(), ["--output", "no/out"], "no/out cannot be written: No such file"),
    "within a file": (_with(), ["--output", "net.py/out"], "cannot be written: Not a directory"),
    "a shape": (_with(), ["--input", "2,5"], "float32 (2, 5)"),
    "a model that fails": (_with(), ["loses"], "ZeroDivisionError"),
    "untied": (_untied, ["tied"], "ties '0.weight' and '2.weight'"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_exit_2_and_nothing_written(
    folder: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, options, said = CASES[case]
    target = options.pop() if options in (["loses"], ["tied"]) else "build"
    path = make(folder)
    _refused(folder, path, said, capsys, *options, target=target)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(
    folder: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, _ = BROKEN[case]
    _refused(folder, make(folder), "", capsys)
    assert not (folder / "ran").exists()  # by code in a pickle


def test_no_permission(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (folder / "closed").mkdir(mode=0o555)
    path = _with()(folder)
    _refused(folder, path, "Permission denied", capsys, "--output", "closed/out")


def _refused(
    folder: Path, path: Path, said: str, capsys: pytest.CaptureFixture[str], *options: str,
    target: str = "build",
) -> None:  # fmt: skip
    before = contents(folder)
    assert run(path, "out", *options, target=target) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("enorm-fx: error: ")
    assert said in err
    assert err.count("\n") == 1
    assert contents(folder) == before


def test_killed_at_any_stage_it_leaves_all_or_nothing(folder: Path) -> None:
    path = FORMATS["sharded"](folder, weights())
    assert _quietly(path) == 0
    output = folder / "out"
    wanted = contents(output)
    _remove(folder)
    stages = []
    for stage in killed_at_every_stage(lambda: _quietly(path), folder):
        stages.append(stage.partition(" ")[0])
        if output.exists():
            assert contents(output) == wanted, stage
        _remove(folder)
    assert {"open", "os.rename"} <= set(stages)
    assert contents(output) == wanted


@pytest.mark.parametrize("form", ["nested", "sharded"])
def test_killed_at_a_random_moment_too(folder: Path, form: str) -> None:
    _killed_at_random(folder, form, times=6)


@pytest.mark.nightly
@pytest.mark.parametrize("form", FORMATS)
def test_killed_at_fifty_random_moments(folder: Path, form: str) -> None:
    _killed_at_random(folder, form, times=50)


def _killed_at_random(folder: Path, form: str, times: int) -> None:
    path = FORMATS[form](folder, weights())
    for _ in range(2):  # the first run of a process takes longer: it imports
        _remove(folder)
        start = time.perf_counter()
        assert _quietly(path) == 0
        seconds = 1.2 * (time.perf_counter() - start)
    wanted, tensors = contents(folder / "out"), read(folder / "out")
    _remove(folder)
    early = 0
    for delay in killed_at_random(lambda: _quietly(path), seconds, times, seed=1):
        if (folder / "out").exists():
            # The legacy format numbers its storages at random: its bytes differ from run to run.
            if form == "legacy":
                assert _same(read(folder / "out"), tensors), delay
            else:
                assert contents(folder / "out") == wanted, delay
        else:
            early += 1
        _remove(folder)
    assert early  # some were killed before it was done


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_may_not_grow(
    folder: Path, form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = FORMATS[form](folder, weights())
    before = contents(folder)
    assert with_room_for(3000, lambda: sys.exit(_quietly(path))) == 2
    err = capfd.readouterr().err
    assert "out cannot be written: File too large" in err
    assert err.count("\n") == 1
    assert contents(folder) == before


def test_a_full_disk(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        (disk / "other").write_bytes(bytes(4096))
        path = _with()(folder)
        _refused(folder, path, "No space left", capsys, "--output", "disk/out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _quietly(path: Path) -> int:
    with contextlib.redirect_stdout(io.StringIO()):
        return run(path, path.parent / "out")


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def _remove(folder: Path) -> None:
    """The output, and what a killed process leaves beside it."""
    for left in (folder / "out", *folder.glob(".out.*.tmp")):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)
