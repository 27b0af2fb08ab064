"""The compiled library: loaded only from where nobody else writes, and of the layout packed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from enorm_fx.enorm import ENorm
from enorm_fx.step.native import compiler, tables
from tests.support.helpers import make

pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a compiler")
owned = pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs owners of files")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache of its own for each test, and nothing loaded before or after it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "_FLAGS", ("-std=c++17", "-O0", "-fPIC"))  # compiles faster
    compiler.load.cache_clear()
    yield tmp_path / "enorm_fx"
    compiler.load.cache_clear()


@owned
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_may_write_is_not_used(cache: Path, mode: int) -> None:
    cache.mkdir()
    cache.chmod(mode)
    assert compiler.cache_folder() != cache
    assert compiler.cache_folder().stat().st_mode & 0o077 == 0


@owned
def test_a_folder_of_another_user_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler.cache_folder() == cache
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert compiler.cache_folder() != cache


@owned
def test_a_folder_that_others_can_exchange_is_not_used(cache: Path) -> None:
    assert compiler.cache_folder() == cache
    cache.parent.chmod(0o777)
    assert compiler.cache_folder() != cache


@owned
@pytest.mark.parametrize("planted", ["writable", "link"])
def test_a_library_that_others_may_have_written_is_not_loaded(cache: Path, planted: str) -> None:
    compiler.load()
    (library,) = cache.iterdir()
    # The one that is loaded keeps its memory: another file comes in its place.
    if planted == "writable":
        library.unlink()
        library.write_text("not a library")
        library.chmod(0o666)
    else:
        elsewhere = cache.parent / "elsewhere.so"
        library.unlink()
        elsewhere.write_text("not a library")
        library.symlink_to(elsewhere)
    compiler.load.cache_clear()
    assert compiler.load().enorm_has_half() in (0, 1)
    assert cache not in Path(compiler.load()._name).parents


def test_the_temporary_folder_goes_with_the_process(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    script = (
        "from enorm_fx.step.native import compiler\n"
        "print(compiler.cache_folder(), compiler.cache_folder().is_dir())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    folder, existed = run.stdout.split()
    assert existed == "True"
    assert not Path(folder).exists()


def test_a_compiler_of_several_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (plain,) = compiler.find_compiler() or ()
    wrapper = tmp_path / "a wrapper"
    wrapper.write_text('#!/bin/sh\necho called >> "$0.log"\nexec "$@"\n')
    wrapper.chmod(0o700)
    monkeypatch.setenv("CXX", f"'{wrapper}' {plain} -DNOTHING")
    assert compiler.find_compiler() == (str(wrapper), plain, "-DNOTHING")
    compiler.load()
    assert "called" in (tmp_path / "a wrapper.log").read_text()


def test_fields_that_change_places_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have one size, so only their names and offsets can tell."""

    class Check(ctypes.Structure):
        _fields_ = [tables.Check._fields_[0], *tables.Check._fields_[:0:-1]]

    assert ctypes.sizeof(Check) == ctypes.sizeof(tables.Check)
    structs = tuple(Check if s is tables.Check else s for s in tables._STRUCTS)
    monkeypatch.setattr(tables, "_STRUCTS", structs)
    with pytest.raises(compiler.CompilerError, match=r"Check, (rate|limit)"):
        compiler.load()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_steps_by_itself() -> None:
    """Two threads have stepped; the child has none of them, and must not wait for them."""
    script = """
import os, signal, torch
from enorm_fx.enorm import ENorm
from torch import nn
torch.set_num_threads(2)
model = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(600, 600), nn.ReLU())))
enorm = ENorm(model, backend="native", last_layer=True, start="as_is")
enorm.step()
child = os.fork()
if not child:
    signal.alarm(20)
    enorm.step()
    os._exit(7)
print(enorm.backend, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    usual = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=usual
    )
    assert run.stdout.split() == ["native", "7"]


def test_threads_take_turns_on_one_step() -> None:
    from concurrent.futures import ThreadPoolExecutor

    cases = [make("chain-linear", seed=3) for _ in range(2)]
    steps = [ENorm(case.plan, last_layer=True, backend="native", start="as_is") for case in cases]
    steps[0].step()
    with ThreadPoolExecutor(4) as pool:
        assert len([*pool.map(lambda _: steps[0].step(), range(40))]) == 40
    for _ in range(41):
        steps[1].step()
    for one, other in zip(*(case.model.parameters() for case in cases), strict=True):
        assert torch.equal(one, other)
