"""What the pages name exists: paths, commands, and the picture of the layers."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from docs import draw

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page.relative_to(ROOT) for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
)
_PATH = re.compile(r"(?<![\w./-])(?:enorm_fx|tests|benchmarks|docs|\.ci)/[\w./-]*[\w/]")
_COMMAND = re.compile(r"python -m ([\w.]*\w)")


def missing(text: str) -> list[str]:
    """Paths of this repository and modules to be run that a text names and that do not exist."""
    paths = [path for path in _PATH.findall(text) if not (ROOT / path).exists()]
    modules = [name for name in _COMMAND.findall(text) if not _is_module(name)]
    return [*paths, *modules]


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_paths_and_commands_exist(page: Path) -> None:
    assert missing((ROOT / page).read_text(encoding="utf-8")) == []


def test_what_does_not_exist_is_found() -> None:
    text = (
        "`enorm_fx/rules/` and `enorm_fx/rules/none.py`, [x](docs/none.md). See tests/none. "
        "`python -m benchmarks.none.at_all` and `python -m benchmarks.speed`."
    )
    assert missing(text) == [
        "enorm_fx/rules/none.py", "docs/none.md", "tests/none", "benchmarks.none.at_all",
    ]  # fmt: skip


def test_links_of_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"


def test_the_picture_is_drawn_from_the_layers() -> None:
    assert draw.FILE.read_text(encoding="utf-8") == draw.picture(), "run python -m docs.draw"
