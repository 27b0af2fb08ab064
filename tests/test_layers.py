"""The package's imports go downwards, in no circle, and take no private name from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.layers import PACKAGE, violations

SMALL_LAYERS = (("errors",), ("low",), ("high",), ("__init__",))
SMALL = {
    "__init__.py": "def f():\n    from net.high import f",
    "errors.py": "",
    "low/__init__.py": "",
    "low/_hidden.py": "_secret = 1",
    "low/open.py": "from net.low._hidden import _secret\nfrom net import errors\nimport torch",
    "low/deep/__init__.py": "",
    "low/deep/leaf.py": "from ...low import _hidden\nfrom .. import open",
    "high/__init__.py": "from net.high.first import f",
    "high/first.py": "from net.low.open import errors\ndef f(): ...",
    "high/second.py": "def g():\n    import net.high.first as first\n    first.f()",
}


def small(folder: Path, **changed: str) -> list[str]:
    """What is wrong with a small package after lines were added to some of its files."""
    for name, text in SMALL.items():
        file = folder / "net" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        more = changed.get(name.removesuffix(".py").replace("/", "_"), "")
        file.write_text(f"{text}\n{more}")
    return violations(folder / "net", SMALL_LAYERS)


def test_imports_keep_to_the_layers() -> None:
    assert violations(PACKAGE) == []


def test_a_sound_package_passes(tmp_path: Path) -> None:
    assert small(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        (
            "low_open",
            "import net.high.second",
            "upward: net.low.open, line 4, imports net.high.second",
        ),
        (
            "low_open",
            "from net.high import f",
            "upward: net.low.open, line 4, imports net.high.__init__.f",
        ),
        (
            "low_open",
            "from net import high",
            "upward: net.low.open, line 4, imports net.high.__init__",
        ),
        (
            "low_open",
            "from ..high.first import f",
            "upward: net.low.open, line 4, imports net.high.first.f",
        ),
        (
            "errors",
            "def f():\n    from net.low import open",
            "upward: net.errors, line 3, imports net.low.open",
        ),
        ("errors", "import net", "upward: net.errors, line 2, imports net.__init__"),
        (
            "errors",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import net.low.open",
            "upward: net.errors, line 4, imports net.low.open",
        ),
        (
            "high_first",
            "def h():\n    from net.high.second import g",
            "circle: net.high.first -> net.high.second -> net.high.first",
        ),
        (
            "high_second",
            "from net.high import f",  # which imports the other module only
            None,
        ),
        (
            "high_first",
            "from net.high import f",
            "circle: net.high.__init__ -> net.high.first -> net.high.__init__",
        ),
        (
            "high_first",
            "from net.low.open import _secret",
            "private: net.high.first, line 3, imports net.low.open._secret",
        ),
        (
            "high_first",
            "from net.low import open\nopen._secret",
            "private: net.high.first, line 4, imports net.low.open._secret",
        ),
        (
            "high_first",
            "import net.low.open\nnet.low.open._secret",
            "private: net.high.first, line 4, imports net.low.open._secret",
        ),
        (
            "high_first",
            "from net.low import _hidden",
            "private: net.high.first, line 3, imports net.low._hidden",
        ),
        ("high_first", "import net.low.open\nnet.low.open.__name__", None),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, line: str, found: str | None) -> None:
    said = small(tmp_path, **{file: line})
    assert (found in said) if found else said == []


def test_a_module_without_a_layer_is_found(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "new.py").touch()
    assert small(tmp_path) == ["new has no place in the list of layers"]
