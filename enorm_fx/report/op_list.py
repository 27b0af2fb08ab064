"""The ops that have a rule, as `enorm-fx ops` prints them.

The list is read from `ops.json`, so that nobody waits for torch; `enorm_fx.report.coverage` writes
that file, and a test holds it equal to the rules.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

FILE = Path(__file__).with_name("ops.json")


@dataclass(frozen=True, slots=True)
class Op:
    """An op key, and what torch, torch.nn.functional (F) and Tensor call it."""

    key: str
    spellings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RuleEntry:
    """Ops that share a rule, and the first sentence of the rule's docstring."""

    summary: str
    ops: tuple[Op, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """The rules of one file of `enorm_fx.rules`, and the first sentence of its docstring."""

    name: str
    summary: str
    rules: tuple[RuleEntry, ...]


def families() -> tuple[Family, ...]:
    """Every op that has a rule, once, by the file and the rule that knows it."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    ops: dict[str, list[Op]] = {}
    for key, op in data["ops"].items():
        ops.setdefault(op["rule"], []).append(Op(key, tuple(op["spellings"])))
    return tuple(
        Family(
            name,
            summary,
            tuple(
                RuleEntry(data["rules"][rule], tuple(found))
                for rule, found in ops.items()
                if rule.partition(".")[0] == name
            ),
        )
        for name, summary in data["families"].items()
    )


def to_dict() -> dict[str, Any]:
    """The list in JSON types."""
    found = families()
    return {
        "count": sum(len(rule.ops) for family in found for rule in family.rules),
        "families": [
            {
                "name": family.name,
                "summary": family.summary,
                "rules": [
                    {
                        "summary": rule.summary,
                        "ops": [{"op": op.key, "spellings": [*op.spellings]} for op in rule.ops],
                    }
                    for rule in family.rules
                ],
            }
            for family in found
        ],
    }


def show(console: Console) -> None:
    """Print a table per family: op keys with their other names, and what becomes of the scale."""
    from rich import box
    from rich.table import Table

    total = 0
    for family in families():
        count = sum(len(rule.ops) for rule in family.rules)
        total += count
        console.print(f"{family.name}: {count} ops", style="bold")
        console.print(family.summary)
        table = Table(
            box=box.SIMPLE_HEAD, leading=1, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0)
        )
        table.add_column("ops (also called)", ratio=1, overflow="fold")
        table.add_column("what becomes of the scale", ratio=1, overflow="fold")
        for rule in family.rules:
            table.add_row(", ".join(op.key + _other_names(op) for op in rule.ops), rule.summary)
        console.print(table)
        console.print()
    console.print(f"{total} ops have a rule; all else is pinned, and the report names it.")


def _other_names(op: Op) -> str:
    """Spellings that are neither the key itself nor its in-place or private form."""
    others = {name.partition(".")[2] for name in op.spellings}
    others = {name for name in others if name.strip("_") != op.key and not name.startswith("_")}
    others -= {f"{name}_" for name in others}
    return f" ({', '.join(sorted(others))})" if others else ""
