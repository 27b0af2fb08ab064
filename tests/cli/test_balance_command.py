"""`enorm-fx balance`: the same function at the optimum, from checkpoint to checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enorm_fx.balancing import balance
from enorm_fx.cli import balance as command
from enorm_fx.cli.main import main
from tests.support.checkpoint_files import FORMATS, read

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8, tied=False, norm=False):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.second = nn.Conv2d(width, width, 1)
        self.third = nn.Conv2d(width, width, 1)
        self.last = nn.Linear(width, 4)
        if tied:
            self.third.weight = self.second.weight

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.third(self.second(x).relu()).relu()
        return self.last(x.mean((2, 3)))

def tied():
    return Net(tied=True)

def normed():
    return Net(norm=True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def model(name: str = "Net", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The target with weights that are badly balanced."""
    namespace: dict[str, Any] = {"__name__": "net"}
    exec(CODE, namespace)
    torch.manual_seed(0)
    made: nn.Module = namespace[name]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(torch.rand(()) * 4 + 0.1)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_()
    return made.eval().to(dtype)


def run(path: Path, *options: str, target: str = "Net", output: str = "out") -> int:
    return main(
        ["balance", f"net.py:{target}", "--checkpoint", str(path), "--output", output,
         "--input", "2,3,6,6", *options]
    )  # fmt: skip


def optimum(net: nn.Module, **settings: Any) -> dict[str, Tensor]:
    """The weights that the library's own function gives."""
    balance(net, **settings)
    return net.state_dict()


@pytest.mark.parametrize(
    ("form", "target"),
    [*((form, "Net") for form in FORMATS), ("sharded", "normed"), ("legacy", "tied")],
)
def test_every_format_gets_the_weights_of_the_function(
    folder: Path, form: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    net = model(target)
    path = FORMATS[form](folder, net.state_dict())
    old = read(path)
    assert run(path, target=target) == 0
    assert "checked" in capsys.readouterr().out
    wanted, found = optimum(net), read(folder / "out")
    assert found.keys() == old.keys()
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in old.items()
    }
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name
    assert any(not torch.equal(tensor, old[name]) for name, tensor in found.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [2, math.inf])
def test_other_types_and_norms(
    folder: Path, dtype: torch.dtype, p: float, capsys: pytest.CaptureFixture[str]
) -> None:
    net = model(dtype=dtype)
    path = FORMATS["safetensors"](folder, net.state_dict())
    assert run(path, "--p", str(p), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    wanted = optimum(net, p=p)
    assert all(torch.equal(wanted[name], t) for name, t in read(folder / "out").items())
    assert found["norm_after"] < found["norm_before"]
    assert found["verified"]["dtype"] == str(dtype).removeprefix("torch.")
    assert found["verified"]["float64_change"] < 1e-12
    assert found["verified"]["skipped"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_change_no_bit_of_the_outputs(
    folder: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    path = FORMATS["safetensors"](folder, model(dtype=dtype).state_dict())
    assert run(path, "--exact", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verified"]["identical"] is True
    assert found["verified"]["float64_change"] == 0
    assert math.log2(found["largest_factor"]) == pytest.approx(3, abs=3)


def test_names_that_the_model_ties_are_changed_where_the_file_has_both(folder: Path) -> None:
    net = model("tied")
    path = FORMATS["zipped"](folder, {n: t.clone() for n, t in net.state_dict().items()})
    assert run(path, target="tied") == 0
    wanted, found = optimum(net), read(folder / "out")
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_what_stays_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = model()
    with torch.no_grad():
        net.get_parameter("second.weight")[:, 2] = 0
        net.get_parameter("last.weight").zero_()
    path = FORMATS["sharded"](folder, net.state_dict())
    (path / "model.gguf").write_bytes(b"0")
    assert run(path, "--json") == 0
    told = {
        entry["reason"]: entry["names"] for entry in json.loads(capsys.readouterr().out)["left_out"]
    }
    assert told["files not copied: other weights"] == ["model.gguf"]
    assert "1 channels that are zero on one side stay" in told
    assert any(reason.startswith("groups that stay") for reason in told)
    assert told["sides that stay: output of the model"] == ["last.weight (output)"]


def test_a_wrong_scale_is_noticed_and_nothing_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = FORMATS["safetensors"](folder, model().state_dict())
    real = command.run_before

    def wrong(net: nn.Module, call: Any, edits: Any, release: Any) -> Any:
        def more(tensor: Tensor) -> None:
            edits["last.weight"](tensor)
            tensor[0] *= 1.001

        return real(net, call, {**edits, "last.weight": more}, release)

    monkeypatch.setattr(command, "run_before", wrong)
    assert run(path) == 2
    said = capsys.readouterr().err
    assert "the outputs changed by " in said
    assert "e-04 in float64: nothing was written" in said
    assert not (folder / "out").exists()


def test_a_wrong_copy_is_noticed_and_removed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = FORMATS["safetensors"](folder, model().state_dict())
    real = command.under_file_names

    def wrong(*arguments: Any) -> Any:
        edits = real(*arguments)
        del edits["second.weight"]
        return edits

    monkeypatch.setattr(command, "under_file_names", wrong)
    before = sorted(folder.iterdir())
    assert run(path) == 2
    assert "would be within" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_a_model_that_gives_no_numbers_cannot_be_checked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "net.py").write_text(CODE.replace("return self.last", "return 0 / 0 * self.last")
                                   .replace("0 / 0", "float('nan')"))  # fmt: skip
    path = FORMATS["safetensors"](folder, model().state_dict())
    assert run(path) == 2
    assert "not finite numbers, so that nothing can be compared" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_the_bar_knows_how_far_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    said: list[tuple[str, float | None]] = []

    @contextmanager
    def recorded() -> Any:
        yield lambda doing, done: said.append((doing, done))

    monkeypatch.setattr(command, "progress", recorded)
    assert run(FORMATS["safetensors"](folder, model().state_dict())) == 0
    done = [part for doing, part in said if doing == "balancing"]
    assert done[0] == 0
    assert done[-1] == 1
    assert all(part is not None and 0 <= part <= 1 for part in done)


def test_pictures_come_with_the_output_or_not_at_all(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    path = FORMATS["safetensors"](folder, model().state_dict())
    before = sorted(folder.iterdir())
    for options, said in (
        (["--html", "no/a.html"], "a.html cannot be written"),
        (["--html", "in.safetensors"], "name a file that ends in .html or .htm"),
        (["--html", "a.html", "--plot", "a.txt"], "name a file that ends in"),
        (["--html", "a.html", "--plot", "a.png", "--p", "0"], "p must be a number"),
        (["--html", "net.py/a.html", "--plot", "a.png"], "a.html cannot be written"),
    ):
        assert run(path, *options) == 2
        assert said in capsys.readouterr().err
        assert sorted(folder.iterdir()) == before
    assert run(path, "--html", "a.html", "--plot", "a.png") == 0
    text = (folder / "a.html").read_text()
    assert "Net, balanced (p = 2)" in text
    assert "second" in text
    assert "output of the model" in text
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in folder.iterdir()} == {
        *(p.name for p in before),
        "out",
        "a.html",
        "a.png",
    }
