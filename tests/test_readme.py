"""The README's code runs, and prints what the README says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run(text: str) -> list[tuple[str, str]]:
    """(expected, printed) for every Python block that a text block follows."""
    namespace: dict[str, Any] = {}
    results = []
    found = blocks(text)
    for (language, content), (after, expected) in zip(found, [*found[1:], ("", "")], strict=True):
        if language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(content, str(README), "exec"), namespace)
            if after == "text":
                results.append((expected, printed.getvalue()))
    return results


def test_code_prints_what_the_readme_says() -> None:
    torch.manual_seed(0)
    results = run(README.read_text())
    assert len(results) >= 2
    for expected, printed in results:
        assert printed == expected


def test_a_wrong_output_would_be_seen() -> None:
    [(expected, printed)] = run("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    assert printed != expected


def test_broken_code_would_be_seen() -> None:
    with pytest.raises(NameError):
        run("```python\nundefined\n```\n")
