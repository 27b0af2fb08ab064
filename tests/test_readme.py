"""The README's code runs, and prints what the README says."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"

# What a block needs that uses this integration.
_EXTRAS = {"lightning": "lightning", "transformers": "accelerate"}


def runnable(content: str) -> bool:
    """Whether the libraries that a block bridges to are installed."""
    used = re.findall(r"enorm_fx\.integrations\.(\w+)", content)
    return all(importlib.util.find_spec(_EXTRAS[name]) for name in used)


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run(text: str) -> list[tuple[str, str]]:
    """(expected, printed) for every Python block that a text block follows."""
    namespace: dict[str, Any] = {}
    results = []
    found = blocks(text)
    for (language, content), (after, expected) in zip(found, [*found[1:], ("", "")], strict=True):
        if language == "python" and runnable(content):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), warnings.catch_warnings():
                if "enorm_fx.integrations" in content:
                    warnings.simplefilter("ignore")  # what other libraries say to each other
                exec(compile(content, str(README), "exec"), namespace)
            if after == "text":
                results.append((expected, printed.getvalue()))
    return results


def test_code_prints_what_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # trainers leave files
    torch.manual_seed(0)
    results = run(README.read_text())
    assert len(results) >= 2
    for expected, printed in results:
        assert printed == expected


@pytest.mark.parametrize(
    "needs",
    [
        ("ENorm(model, optimizer", "loss.backward()", "enorm.step()"),
        ("lightning.Trainer(", "ENormCallback(", "trainer.fit("),
        ("Trainer(llama", "ENormCallback(", "trainer.train()"),
        ("DistributedDataParallel(model)", "ENorm(", ".backward()", "optimizer.step()"),
        ("fully_shard(model", "ENorm(", ".backward()", "enorm.step()"),
    ],
    ids=["plain", "Lightning", "Trainer", "DDP", "FSDP2"],
)
def test_every_loop_has_a_block(needs: tuple[str, ...]) -> None:
    """Such a block is run by the test above, where its library is installed."""
    found = [text for language, text in blocks(README.read_text()) if language == "python"]
    assert any(all(need in text for need in needs) for text in found)
    assert not any(all(need in text for need in (*needs, "no such line")) for text in found)


def test_a_block_is_left_out_only_where_its_library_is_missing() -> None:
    assert runnable("import torch")
    for name, library in _EXTRAS.items():
        found = importlib.util.find_spec(library) is not None
        assert runnable(f"from enorm_fx.integrations.{name} import ENormCallback") is found
    with pytest.raises(KeyError):
        runnable("import enorm_fx.integrations.other")


def test_a_wrong_output_would_be_seen() -> None:
    [(expected, printed)] = run("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    assert printed != expected


def test_broken_code_would_be_seen() -> None:
    with pytest.raises(NameError):
        run("```python\nundefined\n```\n")
