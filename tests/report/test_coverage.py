"""The list of ops that `enorm-fx ops` reads is what the rules say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from enorm_fx.errors import RuleError
from enorm_fx.report import coverage, op_list
from enorm_fx.rules.registry import as_entry


def said_by(listing: dict[str, dict[str, Any]], torch_version: str) -> dict[str, Any]:
    """A listing, without the spellings if they are those of another version of torch."""
    if listing["from"]["torch"] == torch_version:
        return listing
    rules_only = {key: op["rule"] for key, op in listing["ops"].items()}
    return {**listing, "from": {}, "ops": rules_only}


def test_the_file_is_what_the_rules_say() -> None:
    kept, live = json.loads(op_list.FILE.read_text(encoding="utf-8")), coverage.listing()
    version = live["from"]["torch"]
    both = kept["from"]["torch"] == version
    assert said_by(kept, version) == (live if both else said_by(live, "another")), (
        "run python -m enorm_fx.report.coverage"
    )
    if both:
        assert op_list.FILE.read_text(encoding="utf-8") == coverage.text()


def test_spellings_of_another_torch_are_not_compared() -> None:
    one = {"from": {"torch": "2.9"}, "ops": {"relu": {"rule": "a.b", "spellings": ["F.relu"]}}}
    two = {"from": {"torch": "3.0"}, "ops": {"relu": {"rule": "a.b", "spellings": []}}}
    other = {"from": {"torch": "3.0"}, "ops": {"relu": {"rule": "a.c", "spellings": []}}}
    assert said_by(one, "3.0") == said_by(two, "another")
    assert said_by(one, "3.0") != said_by(other, "another")


def test_rules_of_one_name_must_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def relu() -> None:
        """One."""

    def other() -> None:
        """Two."""

    other.__name__ = "relu"
    monkeypatch.setattr(coverage, "table", lambda: {"relu": as_entry(relu), "abs": as_entry(other)})
    with pytest.raises(RuleError, match=r"the name test_coverage\.relu"):
        coverage.listing()
