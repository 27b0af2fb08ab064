"""`enorm-fx smooth`: another checkpoint of the same function, or one line that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enorm_fx.cli.main import main

CODE = """
import torch
from torch import nn

def build(width=8):
    return nn.Sequential(
        nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, width), nn.LeakyReLU(),
        nn.Linear(width, 3),
    )

def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield torch.randn(8, 4, generator=generator)

listed = [*batches()]
empty = []
wide = [torch.zeros(2, 5)]
number = 3
infinite = [torch.full((2, 4), float("inf"))]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    torch.manual_seed(0)
    state = {name: w + torch.randn_like(w) for name, w in model().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "in.pt")
    return tmp_path


def model() -> nn.Module:
    namespace: dict[str, Any] = {}
    exec(CODE, namespace)
    made: nn.Module = namespace["build"]()
    return made


def outputs(file: Path) -> Tensor:
    net = model()
    net.load_state_dict(torch.load(file)["state_dict"])
    with torch.no_grad():
        return net(torch.linspace(-2, 2, 40).view(10, 4))  # type: ignore[no-any-return]


def smooth(*options: str, output: str = "out.pt", batches: str = "net.py:batches") -> int:
    return main(
        ["smooth", "net.py:build", "--checkpoint", "in.pt", "--output", output,
         "--batches", batches, *options]
    )  # fmt: skip


@pytest.mark.parametrize("batches", ["net.py:batches", "net.py:listed"])
@pytest.mark.parametrize("options", [[], ["--alpha", "0.8"], ["--method", "awq"]])
def test_the_output_computes_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], batches: str
) -> None:
    before = (folder / "in.pt").read_bytes()
    assert smooth(*options, batches=batches) == 0
    out = capsys.readouterr().out
    assert "2 groups, 16 channels, calibrated with 3 batches; out.pt holds the same function" in out
    assert "1.weight     2.weight" in out
    assert ("ratio" in out) == ("awq" in options)
    assert (folder / "in.pt").read_bytes() == before
    old, new = torch.load("in.pt"), torch.load("out.pt")
    assert new["epoch"] == 3
    moved = [n for n, w in new["state_dict"].items() if not torch.equal(w, old["state_dict"][n])]
    assert moved == ["1.weight", "1.bias", "2.weight", "2.bias", "4.weight"]
    assert torch.allclose(outputs(folder / "out.pt"), outputs(folder / "in.pt"), rtol=1e-4)


def test_json_alone_on_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert smooth("--json", "--method", "awq", "--bits", "3", "--group-size", "0") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["batches"], found["channels"]) == ("awq", 3, 16)
    assert found["verified_change"] < 1e-12
    assert [g["consumers"] for g in found["groups"]] == [["2.weight"], ["4.weight"]]
    assert all(0 < g["error"] <= 1 and g["ratio"] is not None for g in found["groups"])
    assert found["left_out"] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batches", "net.py:empty"], "--batches net.py:empty is empty"),
        (["--batches", "net.py:number"], "is no iterable, but a int"),
        (["--batches", "net.py:nothing"], "net.py has no nothing"),
        (["--batches", "data"], "must be package.module:name"),
        (["--batches", "net.py:wide"], "(2, 5)"),
        (["--batches", "net.py:infinite"], "read activations that are not finite"),
        (["--alpha", "2"], "alpha must be above 0"),
        (["--method", "gptq"], "method must be one of"),
        (["--checkpoint", "none.pt"], "none.pt"),
        (["--output", "in.pt"], "the output in.pt is the input"),
        (["--output", "nowhere/out.pt"], "nowhere"),
        (["--arg", "width=9"], "has the shape (8, 4)"),
    ],
)
def test_one_line_exit_2_and_nothing_written(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    files = {path: path.read_bytes() for path in folder.iterdir()}
    assert smooth(*options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("enorm-fx: error: ")
    assert said in err
    assert err.count("\n") == 1
    assert {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} == files
