"""Whatever is wrong with a target or an option: one line on stderr, status 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import enorm_fx
from enorm_fx.cli.target import TargetError, foreign_code
from tests.support.cli_folder import error_line, filled, run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with filled(tmp_path, monkeypatch) as made:
        yield made


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "must be package.module:name"),
        ("net.py", "must be package.module:name"),
        ("net.py:", "must be package.module:name"),
        (":Net", "must be package.module:name"),
        ("net.py:a b", "must be package.module:name"),
        ("net.py:a..b", "must be package.module:name"),
        ("missing.py:Net", "there is no file missing.py"),
        ("missing/net.py:Net", "there is no file missing/net.py"),
        ("notes.txt:Net", "notes.txt is no Python file"),
        ("package_of_nets/:Net", "there is no file package_of_nets/"),
        ("package_of_nets:Net", "package_of_nets has no Net"),
        ("net.py:Missing", "net.py has no Missing"),
        ("net.py:TwoInput", "close to it: TwoInputs"),
        ("no_such_package.nets:Net", "there is no module no_such_package: install it"),
        ("package_of_nets.missing:Net", "there is no module package_of_nets.missing: install it"),
        ("net.py:Outer.Missing", "net.py has no Outer.Missing"),
        ("there.is.no.module:Net", "there is no module there: install it"),
        (".relative:Net", "importing .relative failed: TypeError"),
        ("imports.py:Net", "No module named 'there_is_no_such_module' (at"),
        ("syntax.py:Net", "SyntaxError: invalid syntax (syntax.py, line 1)"),
        ("nulls.py:Net", "cannot contain null bytes"),
        ("quits.py:Net", "importing quits.py failed: SystemExit: bye"),
        ("raises.py:Net", "importing raises.py failed: E: at import"),
        ("net.py:number", "number in net.py is of type int"),
        ("net.py:nothing", "nothing returned an object of type NoneType, not a torch.nn.Module"),
        ("net.py:odd", "calling odd failed: OddError: two lines (at "),
        ("net.py:silent", "calling silent failed: OddError (at "),
        ("net.py:leave", "calling leave failed: SystemExit: 3"),
        ("net.py:wide", "calling wide failed: RuntimeError: bad: end"),
        ("net.py:make", "missing 1 required positional argument: 'width'"),
        ("net.py:Odd", "analyzing the model failed: OddError: odd in forward (at "),
        ("net.py:Leaves", "analyzing the model failed: SystemExit: gone"),
        ("net.py:Branch", "the values of a tensor"),
        ("net.py:TwoInputs", "pass --input"),
        ("net.py:Unfinished", "pass --input"),
    ],
)
def test_a_bad_target_is_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], target: str, message: str
) -> None:
    path = list(sys.path)
    for options in ([], ["--json"]):
        status, out, err = run(capsys, "analyze", target, *options)
        assert status == 2
        assert message in error_line(err)
        assert not options or out == ""
    assert sys.path == path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arg", "width"], "--arg must be NAME=VALUE, not 'width'"),
        (["--arg", "=3"], "--arg must be NAME=VALUE"),
        (["--arg", "a b=3"], "--arg must be NAME=VALUE"),
        (["--arg", "depth=3"], "unexpected keyword argument 'depth'"),
        (["--arg", "width=many"], "calling Net failed: TypeError"),
        (["--arg", "width=-1"], "calling Net failed: RuntimeError"),
        (["--input", ""], "--input must be a shape"),
        (["--input", "2,x"], "--input must be a shape"),
        (["--input", "2,,4"], "--input must be a shape"),
        (["--input", "2,0"], "--input must be a shape"),
        (["--input", "9999999999,9999999999"], "--input must be a shape"),
        (["--input", "9" * 5000], "--input must be a shape"),
        (["--input", "2,4:int65"], "'int65' is no torch dtype"),
        (["--input", "2,4:Tensor"], "'Tensor' is no torch dtype"),
        (["--input", "2,4:"], "'' is no torch dtype"),
        (["--input", "2,5"], "Pass --input that the model accepts"),
        (["--input", "2,4", "--input", "2,4"], "positional argument"),
        (["--input"], "expected one argument (see enorm-fx analyze --help)"),
        (["--batchnorm", "fold"], "batchnorm must be one of 'skip', 'affine', not 'fold'"),
        (["--biases", "fold"], "biases must be one of"),
        (["--frozen", "fold"], "frozen must be one of"),
        (["--tracer", "fold"], "tracer must be one of"),
        (["--why", "thee"], "the model has no weight 'thee'; it has one, one.weight, "),
        (["--why", "one.wieght"], "the model has no weight 'one.wieght'; close to it: one.weight"),
        (["--why", "one", "--json"], "--why explains in sentences"),
        (["--dot", "missing/net.dot"], "missing/net.dot cannot be written: No such file"),
        (["--html", "."], "--html .: name a file that ends in .html or .htm"),
        (["--html", "weights.pth"], "name a file that ends in .html or .htm"),
        (["--dot", "net.py"], "--dot net.py: name a file that ends in .dot or .gv"),
        (["--dot", "."], "name a file that ends in"),
        (["--fold"], "unrecognized arguments: --fold"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    status, _, err = run(capsys, "analyze", "net.py:Net", *options)
    assert status == 2
    assert message in error_line(err)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND (see enorm-fx --help)"),
        (["fold"], "invalid choice: 'fold'"),
        (["analyze"], "required: TARGET"),
        (["analyze", "net.py:net", "--arg", "width=3"], "it takes no --arg"),
        (["demo", "--epochs", "0"], "epochs must be 1 or more"),
        (["demo", "--epochs", "x"], "invalid int value"),
        (["demo", "--seed", "-1"], "--seed must be between 0"),
        (["demo", "--output", "picture.svg"], "must end in .png"),
    ],
)
def test_other_wrong_arguments_are_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    if argv[:1] == ["demo"]:
        pytest.importorskip("sklearn")
        pytest.importorskip("matplotlib")
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert message in error_line(err)


def test_an_error_names_the_users_line_and_none_of_the_package() -> None:
    within = Path(enorm_fx.__file__).parent / "tracing" / "some.py"
    spaces: dict[str, Any] = {}
    exec(compile("def fail(): raise OSError('gone')", str(within), "exec"), spaces)
    exec(compile("\n\ndef forward(): fail()", "/home/user/net.py", "exec"), spaces)
    where = r"^running it failed: OSError: gone \(at /home/user/net\.py:3\)$"
    with pytest.raises(TargetError, match=where), foreign_code("running it"):
        spaces["forward"]()


def test_traceback_is_shown_on_request_only(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "analyze", "net.py:odd", "--traceback")
    assert status == 2
    assert "Traceback (most recent call last)" in err
    assert "OddError: two\nlines" in err
    assert err.splitlines()[-1].startswith("enorm-fx: error: calling odd failed")
