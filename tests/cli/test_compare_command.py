"""`enorm-fx verify` and `enorm-fx compare`: two checkpoints, or one line that says why not."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from enorm_fx import analyze
from enorm_fx.cli.main import main
from tests.support.checkpoint_files import safetensors, zipped

CODE = """
from torch import nn

def build(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a.safetensors, a rescaling in b.pt, a changed weight in c.pt, NaN in nan.pt."""
    (tmp_path / "net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    safetensors(tmp_path, model.state_dict()).rename("a.safetensors")
    other = copy.deepcopy(model)
    plan = analyze(other)
    plan.rescale_(torch.linspace(-1, 1, plan.num_scales, dtype=torch.float64))
    zipped(tmp_path, other.state_dict()).rename("b.pt")
    with torch.no_grad():
        other[2].weight[1, 2] *= 1.5
    zipped(tmp_path, other.state_dict()).rename("c.pt")
    with torch.no_grad():
        other[2].weight[1, 2] = math.nan
    zipped(tmp_path, other.state_dict()).rename("nan.pt")
    return tmp_path


@pytest.mark.parametrize(("b", "status"), [("a.safetensors", 0), ("b.pt", 0), ("c.pt", 1)])
def test_verify_tells_a_rescaling_from_a_change(
    folder: Path, capsys: pytest.CaptureFixture[str], b: str, status: int
) -> None:
    assert main(["verify", "net.py:build", "a.safetensors", b]) == status
    out = capsys.readouterr().out
    assert ("Same: no output" in out, "Different: output 0" in out) == (status == 0, status == 1)
    assert main(["verify", "net.py:build", "a.safetensors", b, "--json"]) == status
    found = json.loads(capsys.readouterr().out)
    assert (found["same"], found["rescaling"]) == (status == 0, status == 0)
    change = found["outputs"][0]["change_in_float64"]
    assert (change > 1e-3) == (status == 1)


@pytest.mark.parametrize(("b", "changed"), [("b.pt", False), ("c.pt", True)])
def test_compare_shows_what_rescaling_does_not_explain(
    folder: Path, capsys: pytest.CaptureFixture[str], b: str, changed: bool
) -> None:
    pytest.importorskip("matplotlib")
    command = ["compare", "net.py:build", "a.safetensors", b]
    assert main([*command, "--plot", "plot.png"]) == 0
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    said = f"they are {'not ' if changed else ''}rescalings of one network"
    assert said in " ".join(capsys.readouterr().out.split())
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["before"] > 0.1
    assert (found["after"] > 1e-3) == changed


@pytest.mark.parametrize("command", ["verify", "compare"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["a.safetensors", "none.pt"], "none.pt cannot be read"),
        (["a.safetensors", "nan.pt"], "'2.weight' in nan.pt has entries that are not finite"),
        (["a.safetensors", "b.pt", "--arg", "width=9"], "has the shape (8, 4)"),
    ],
)
def test_errors_are_one_line_with_exit_2(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, options: list[str], said: str
) -> None:
    assert main([command, "net.py:build", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("enorm-fx: error: ")
    assert said in err
    assert err.count("\n") == 1


def test_a_plot_that_cannot_be_drawn(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compare", "net.py:build", "a.safetensors", "b.pt", "--plot"]
    assert main([*command, "plot.txt"]) == 2
    assert "name a file that ends in .pdf, .png, .svg" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*command, "plot.png"]) == 2
    assert "pip install 'enorm-fx[plot]'" in capsys.readouterr().err
    assert not (folder / "plot.png").exists()
