"""`enorm-fx balance --fold-batchnorm`: folded, balanced, and loaded by the same class."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from enorm_fx.balancing import balance
from enorm_fx.cli.main import main
from enorm_fx.folding import batchnorm
from enorm_fx.folding.batchnorm import fold_batchnorm_
from enorm_fx.verifying import relative_change
from tests.support.checkpoint_files import FORMATS, read

CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.second, self.other = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False)
        self.pooled, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.pooled(self.other(self.second(x)).relu())
        return self.last(x)

class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
"""
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def model(name: str = "Net", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The target as after training, badly balanced."""
    namespace: dict[str, type[nn.Module]] = {}
    exec(CODE, namespace)
    torch.manual_seed(0)
    made = namespace[name]()
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.mul_(torch.rand(()) * 4 + 0.1).add_(0.1 * torch.randn(tensor.shape))
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 3)
    return made.eval().to(dtype)


def run(path: Path, *options: str, target: str = "Net") -> int:
    return main(
        ["balance", f"net.py:{target}", "--checkpoint", str(path), "--output", "out",
         "--input", "2,3,6,6", "--fold-batchnorm", *options]
    )  # fmt: skip


def outputs(net: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [net.double()(IMAGES.double())]


@pytest.mark.parametrize(
    ("form", "dtype", "tolerance"),
    [("sharded", torch.float32, 1e-5), ("zipped", torch.float64, 1e-12)],
)
def test_the_same_class_loads_the_folded_and_balanced_weights(
    folder: Path, form: str, dtype: torch.dtype, tolerance: float,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    net = model(dtype=dtype)
    path = FORMATS[form](folder, net.state_dict())
    before = read(path)
    assert run(path, "--p", "inf", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["folded"] == ["norm", "other"]
    assert report["norm_after"] < report["norm_before"]
    assert 0 <= report["verified"]["float64_change"] < tolerance
    assert ["pooled"] in [entry["names"] for entry in report["left_out"]]
    assert {n: t.clone() for n, t in read(path).items()}.keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in read(path).items())

    found = read(folder / "out")
    loaded = model(dtype=dtype)
    loaded.load_state_dict(found)
    assert relative_change(outputs(copy.deepcopy(net)), outputs(loaded)) < tolerance
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in before.items()
    }
    assert torch.equal(found["norm.weight"], torch.ones(8, dtype=dtype))

    folding = fold_batchnorm_(net, IMAGES.to(dtype))  # the library's own functions give the same
    balance(net, IMAGES.to(dtype), p=float("inf"))
    folding.put_back_()
    assert all(torch.equal(t, found[n]) for n, t in net.state_dict().items())


def test_a_model_without_batchnorm_is_balanced_as_ever(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = model("Plain")
    path = FORMATS["safetensors"](folder, net.state_dict())
    assert run(path, target="Plain") == 0
    assert "0 BatchNorms into the layers before;" in capsys.readouterr().out
    balance(net, IMAGES)
    assert all(torch.equal(t, read(folder / "out")[n]) for n, t in net.state_dict().items())


def test_exact_and_folding_exclude_each_other(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = FORMATS["safetensors"](folder, model().state_dict())
    assert run(path, "--exact") == 2
    assert "--exact keeps the outputs to the last bit" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_wrong_fold_is_not_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = batchnorm.fuse_conv_bn_weights

    def wrong(weight: Tensor, bias: Tensor, mean: Tensor, *rest: Tensor, **kw: bool) -> object:
        return right(weight, bias, mean + 1e-3, *rest, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(batchnorm, "fuse_conv_bn_weights", wrong)
    path = FORMATS["safetensors"](folder, model().state_dict())
    assert run(path) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert not (folder / "out").exists()
