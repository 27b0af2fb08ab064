"""The benchmark of facenet-pytorch's networks runs the command and tells noise rightly."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import facenet as benchmark
from benchmarks._environment import RESULTS

DOCS = Path(__file__).parents[2] / "docs" / "results.md"
MODULE = """
import torch
from torch import nn

class RNet(nn.Module):
    def __init__(self, pretrained=True):
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 6, 3), nn.PReLU(6)
        self.dense2_1, self.dense2_2 = nn.Linear(6, 2), nn.Linear(6, 4)

    def forward(self, x):
        x = self.prelu1(self.conv1(x)).mean((2, 3))
        return self.dense2_2(x), torch.softmax(self.dense2_1(x), 1)

PNet = ONet = None
"""


def _wheel(folder: Path) -> Path:
    """As the real one: __init__ asks for what is not installed, weights lie beside the code."""
    scope: dict[str, type[torch.nn.Module]] = {}
    exec(MODULE, scope)
    torch.manual_seed(0)
    state = scope["RNet"]().state_dict()
    for name in ("conv1.weight", "conv1.bias"):  # badly scaled: rounding loses the other channels
        state[name][0] *= 100
    for name in ("dense2_1.weight", "dense2_2.weight"):
        state[name][:, 0] /= 100
    torch.save(state, folder / "rnet.pt")
    with zipfile.ZipFile(folder / "tiny.whl", "w") as wheel:
        wheel.writestr("facenet_pytorch/__init__.py", "import not_installed")
        wheel.writestr("facenet_pytorch/models/mtcnn.py", MODULE)
        wheel.write(folder / "rnet.pt", "facenet_pytorch/data/rnet.pt")
    return folder / "tiny.whl"


def test_a_network_goes_through_the_command_and_has_less_noise_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "SIZES", {"RNet": 8})
    monkeypatch.setattr(benchmark, "POWERS", ("inf",))
    out = tmp_path / "facenet.json"
    assert benchmark.main(["--wheel", str(_wheel(tmp_path)), "--output", str(out)]) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    assert benchmark.table(record) in capsys.readouterr().out
    before, after = (record["networks"]["RNet"][state] for state in ("as trained", "p = inf"))
    assert after["scales"] == 6
    assert after["float64_change"] < 1e-12
    assert after["norm_after"] < after["norm_before"]
    for bits in ("int8", "int4"):
        assert set(after[bits]["weights"]) == {"conv1", "dense2_1", "dense2_2"}
        assert min(after[bits]["outputs"]) > min(before[bits]["outputs"])


def test_decibels() -> None:
    signal = torch.tensor([3.0, 4.0])
    assert benchmark.decibels(signal, signal + torch.tensor([0.3, 0.4])) == pytest.approx(20.0)
    assert benchmark.decibels(signal, signal + torch.tensor([3.0, -4.0])) == pytest.approx(0.0)


def test_the_table_in_the_documentation_is_that_of_the_record() -> None:
    record = json.loads((RESULTS / "facenet.json").read_text(encoding="utf-8"))
    assert benchmark.table(record) in DOCS.read_text(encoding="utf-8")
