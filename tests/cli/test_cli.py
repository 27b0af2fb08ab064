"""The command line: exit statuses, what goes to stdout and stderr, and one line for every error."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import enorm_fx
from enorm_fx import rules
from enorm_fx.cli.main import main
from tests.support.cli_folder import NET, error_line, filled, run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with filled(tmp_path, monkeypatch) as made:
        yield made


def _change(out: str) -> float:
    """What --verify printed."""
    found = re.search(r"verified +largest relative change of the outputs (\S+),", out)
    assert found is not None, out
    return float(found[1])


@pytest.mark.parametrize(
    "target",
    [
        "net.py:Net", "./net.py:Net", "net.py:net", "net.py:Outer.Inner", "user.py:Net",
        "json.py:Net", "records.py:make", "package_of_nets.nets:Net", "package_of_nets/nets.py:net",
    ],
)  # fmt: skip
def test_analyzes_classes_functions_and_modules(
    folder: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    path, modules = list(sys.path), sys.modules["json"]
    status, out, err = run(capsys, "analyze", target)
    assert (status, err) == (0, "")
    assert f"from {target}\n" in out
    assert re.search(r"^ +\d +(one|0) +(two|2) +relu", out, re.MULTILINE)
    assert re.search(r"exact +yes", out)
    assert re.search(r"traced +in evaluation mode by the \w+ front end, \d+\.\d s", out)
    assert sys.path == path
    assert sys.modules["json"] is modules


def test_finds_a_file_by_its_whole_path(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "analyze", f"{folder / 'net.py'}:Net")
    assert status == 0
    assert re.search(r"8 +one +two +relu", out)


@pytest.mark.parametrize("target", ["net.py:Net", "net.py:Normed"])
@pytest.mark.parametrize("options", [[], ["--batchnorm", "affine"], ["--biases", "balance"]])
def test_json_is_the_dict_of_the_plan_and_nothing_else(
    folder: Path, capsys: pytest.CaptureFixture[str], target: str, options: list[str]
) -> None:
    status, out, err = run(capsys, "analyze", target, "--json", *options)
    assert status == 0
    assert "importing the net" in err
    namespace: dict[str, type[nn.Module]] = {}
    exec(NET, namespace)
    chosen = dict(zip((o.removeprefix("--") for o in options[::2]), options[1::2], strict=True))
    plan = enorm_fx.analyze(namespace[target.partition(":")[2]]().eval(), **chosen)
    expected = plan.to_dict()
    found = json.loads(out)
    for data in (expected, found):  # the source of the model is another file
        for blocked in data["blocked"]:
            blocked["source"] = ""
            blocked["chain"] = len(blocked["chain"])
    assert found == expected
    assert list(found) == list(expected)


def test_json_leaves_verification_to_stderr(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "analyze", "net.py:Net", "--json", "--verify")
    assert status == 0
    assert json.loads(out)["num_scales"] == 8
    assert "running the net" in err
    assert "verified: largest relative change" in err


def test_arguments_are_literals_or_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(
        capsys, "analyze", "net.py:Net", "--json", "--arg", "width=1_2", "--arg", "act=tanh"
    )
    data = json.loads(out)
    assert status == 0
    assert data["num_scales"] == 0
    assert data["parameters"][0]["shape"] == [12, 4]
    assert any("tanh" in blocked["reason"] for blocked in data["blocked"])


@pytest.mark.parametrize(
    ("target", "inputs"),
    [
        ("net.py:Net", ["2,4"]),
        ("net.py:Net", ["7, 2, 4:float32"]),
        ("net.py:TwoInputs", ["2,4", "1,4"]),
        ("net.py:Tokens", ["2,5:int64"]),
    ],
)
def test_inputs_are_shapes_with_types(
    folder: Path, capsys: pytest.CaptureFixture[str], target: str, inputs: list[str]
) -> None:
    options = [word for text in inputs for word in ("--input", text)]
    status, out, err = run(capsys, "analyze", target, *options, "--verify")
    assert (status, err) == (0, "")
    assert _change(out) < 1e-12


def test_mode_is_chosen_and_put_back(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    nets = importlib.import_module("package_of_nets.nets")

    modes = [module.training for module in nets.net.modules()]
    assert modes == [True, False, True]
    for mode, options in (("evaluation", []), ("training", ["--train"])):
        status, out, _ = run(capsys, "analyze", "package_of_nets.nets:net", *options)
        assert status == 0
        assert f"in {mode} mode" in out
        assert [module.training for module in nets.net.modules()] == modes
    _, evaluated, _ = run(capsys, "analyze", "net.py:Normed", "--json")
    _, trained, _ = run(capsys, "analyze", "net.py:Normed", "--json", "--train")
    reasons = [[b["reason"] for b in json.loads(text)["blocked"]] for text in (evaluated, trained)]
    assert len(reasons[0]) == len(reasons[1]) == 2


def test_random_numbers_logs_and_gradients_are_left_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    changes = [_change(run(capsys, "analyze", "net.py:Normed", "--verify")[1]) for _ in range(2)]
    assert changes[0] == changes[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize(("options", "exact"), [([], False), (["--batchnorm", "affine"], True)])
def test_says_whether_and_why_not_exact(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], exact: bool
) -> None:
    status, out, _ = run(capsys, "analyze", "net.py:Normed", "--verify", *options)
    assert status == 0, "a plan that is not exact may change the outputs"
    assert re.search(r"exact +yes: " if exact else r'exact +no: batchnorm="skip"', out)
    assert (_change(out) < 1e-12) == exact


def test_an_exact_plan_that_changes_the_outputs_gives_status_1(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import enorm_fx.verifying

    module = sys.modules["enorm_fx.verifying"]
    for change, status in ((1e-12, 0), (0.25, 1), (float("inf"), 1), (float("nan"), 1)):
        found = enorm_fx.Verification(change, 3, True)
        monkeypatch.setattr(module, "verify", lambda plan, found=found: found)
        got, out, _ = run(capsys, "analyze", "net.py:Net", "--verify")
        assert got == status
        assert ("NOT KEPT" in out) == bool(status)


def test_all_pairs_lists_those_of_a_residual_stream_too(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchvision")
    target = "torchvision.models:resnet18"
    status, out, _ = run(capsys, "analyze", target, "--all")
    assert status == 0
    assert "Pairs: 23\n" in out
    assert not re.search(r"^ +64 +conv1 +layer2\.0\.downsample\.0 +\S", out, re.MULTILINE)
    status, out, _ = run(capsys, "analyze", target, "--all-pairs")
    assert status == 0
    assert "Pairs: 38\n" in out
    assert re.search(r"^ +64 +conv1 +layer2\.0\.downsample\.0 +\S", out, re.MULTILINE)


def test_resnet18_shows_its_residual_streams_whole(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = pytest.importorskip("torchvision.models")
    plan = enorm_fx.analyze(models.resnet18().eval())
    streams = [group for group in plan.groups if len(group.producers) > 1]
    assert [len(group.producers) for group in streams] == [3, 3, 3, 3]
    status, out, _ = run(capsys, "analyze", "torchvision.models:resnet18")
    assert status == 0
    table = out.partition("Groups with several")[2].partition("Pairs:")[0]
    blocks = re.split(r"\n *\n", table)
    assert len(blocks) >= len(streams)
    for group, block in zip(streams, blocks, strict=False):
        assert re.search(rf"^ +{group.channels} ", block, re.MULTILINE)
        words = block.split()
        for name in (*group.producers, *group.consumers):
            assert name.removesuffix(".weight") in words
    assert "Pairs: 8, the other 15 are in the groups above" in out


def test_why_explains_weights_instead_of_the_tables(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    argv = ("analyze", "net.py:Net", "--why", "one", "--why", "two.weight", "--verify")
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, "")
    assert "Pairs:" not in out
    assert max(map(len, out.splitlines())) <= 60
    parts = out.split("\n\n")
    assert [part.split()[0] for part in parts[1:3]] == ["one.weight", "two.weight"]
    assert "Input side: pinned.\n    1. Input 'x' of the model" in parts[1]
    assert "- d multiplies one\n      - passes through relu\n      - divides two (this)" in parts[2]
    assert parts[-1].startswith("verified: largest relative change")


def test_ops_lists_exactly_the_rules(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "ops", "--json")
    assert (status, err) == (0, "")
    data = json.loads(out)
    found = [o["op"] for f in data["families"] for r in f["rules"] for o in r["ops"]]
    assert sorted(found) == list(rules.table())
    assert data["count"] == len(found)


def test_ops_prints_every_op_with_its_family(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    status, out, err = run(capsys, "ops")
    assert (status, err) == (0, "")
    words = set(re.findall(r"\w+", out))
    assert words >= set(rules.table())
    assert "concatenate" in words, "another name of cat"
    assert re.search(r"^linear: \d+ ops$", out, re.MULTILINE)
    assert f"\n{len(rules.table())} ops have a rule" in out


def test_draws_into_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("analyze", "net.py:Net", "--dot", "net.dot", "--html", "net.html")
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, "")
    assert re.search(r"^drawn in +net\.dot *\ndrawn in +net\.html", out, re.MULTILINE)
    assert (folder / "net.dot").read_text(encoding="utf-8").startswith("digraph plan {")
    page = (folder / "net.html").read_text(encoding="utf-8")
    assert "<title>Net from net.py:Net</title>" in page
    assert run(capsys, *argv, "--json")[0] == 0


def test_interrupt_gives_status_130(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "stops.py").write_text("raise KeyboardInterrupt")
    assert run(capsys, "analyze", "stops.py:Net") == (130, "", "")


@pytest.mark.parametrize("argv", [["--help"], ["analyze", "--help"], ["demo", "--help"]])
def test_help_gives_status_0(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, "")
    assert out.startswith("usage: enorm-fx")


def test_help_names_every_value_that_analyze_takes(capsys: pytest.CaptureFixture[str]) -> None:
    from enorm_fx import analysis

    _, out, _ = run(capsys, "analyze", "--help")
    for option, values in analysis._CHOICES.items():
        assert f"--{option} {'|'.join(values)}" in out


def test_demo_hands_its_options_over(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from enorm_fx.demo import run as demo

    calls = []
    monkeypatch.setattr(demo, "run", lambda *args, **options: calls.append((args[1], options)))
    assert main(["demo"]) == 0
    assert main(["demo", "--epochs", "2", "--seed", "5", "--output", "x.png"]) == 0
    assert calls == [
        (Path("enorm_demo.png"), {"epochs": 10, "seed": 0}),
        (Path("x.png"), {"epochs": 2, "seed": 5}),
    ]

    def refuses(*args: object, **options: object) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(demo, "run", refuses)
    status, _, err = run(capsys, "demo")
    assert status == 2
    assert "enorm_demo.png cannot be written: not here" in error_line(err)


def _python(*argv: str) -> subprocess.CompletedProcess[str]:
    root = Path(enorm_fx.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, env=environment, check=False
    )


def test_version_is_that_of_the_package() -> None:
    done = _python("-m", "enorm_fx", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == enorm_fx.__version__


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    code = (
        "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1);"
        "from enorm_fx.cli.main import main; sys.exit(main(['analyze', sys.argv[1], '--json']))"
    )
    done = _python("-c", code, f"{tmp_path / 'net.py'}:Net")
    assert done.returncode == 1
    assert set(done.stderr.splitlines()) == {"importing the net", "running the net"}
