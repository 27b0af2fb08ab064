"""What a wheel of the package holds, and which names the package has."""

from __future__ import annotations

import pkgutil
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import enorm_fx

ROOT = Path(enorm_fx.__file__).parents[1]


def _sources(folder: Path) -> set[str]:
    """Every file of the package, relative to the folder that it lies in."""
    files = (folder / "enorm_fx").rglob("*")
    return {
        file.relative_to(folder).as_posix()
        for file in files
        if file.is_file() and "__pycache__" not in file.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel, built from a copy of what it is made of."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(
        ROOT / "enorm_fx", copy / "enorm_fx", ignore=shutil.ignore_patterns("__pycache__")
    )
    (copy / "enorm_fx" / "report" / "draft.txt").touch()
    code = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(copy)], cwd=copy, check=True)
    [built] = copy.glob("*.whl")
    return zipfile.ZipFile(built)


def test_a_wheel_holds_every_file_of_the_package_and_no_other(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == _sources(ROOT)
    assert {"enorm_fx/py.typed", "enorm_fx/report/ops.json"} <= names
    for ending in (".cpp", ".h", ".css", ".html", ".js"):
        assert any(name.endswith(ending) for name in names)


def test_a_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    [metadata] = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    lines = wheel.read(metadata).decode().partition("\n\n")[0].splitlines()
    assert f"Version: {enorm_fx.__version__}" in lines
    assert "License-Expression: Apache-2.0" in lines
    assert {"Requires-Dist: torch>=2.9", "Provides-Extra: demo", "Provides-Extra: dev"} <= {*lines}
    [entries] = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    assert "enorm-fx = enorm_fx.cli.main:main" in wheel.read(entries).decode()


def test_public_names_are_no_modules_whatever_was_imported() -> None:
    for module in pkgutil.iter_modules(enorm_fx.__path__):
        if module.name != "__main__":
            import_module(f"enorm_fx.{module.name}")
    assert set(enorm_fx.__all__) <= set(dir(enorm_fx))
    for name in enorm_fx.__all__:
        for _ in range(2):
            assert not isinstance(getattr(enorm_fx, name), ModuleType)
    with pytest.raises(AttributeError, match="has no attribute 'analyse'"):
        enorm_fx.analyse  # noqa: B018
