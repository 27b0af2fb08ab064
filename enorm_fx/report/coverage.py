"""Which ops have a rule, read off the rules themselves: what `enorm-fx ops` prints."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from enorm_fx.rules import table
from enorm_fx.tracing.op_keys import op_key

if TYPE_CHECKING:
    from rich.console import Console

_SPACES = (("torch", torch), ("F", F), ("Tensor", torch.Tensor))


@dataclass(frozen=True, slots=True)
class Family:
    """The rules of one file. summary: the first sentence of its docstring."""

    name: str
    summary: str
    rules: tuple[RuleEntry, ...]


@dataclass(frozen=True, slots=True)
class RuleEntry:
    """Op keys that share a rule, and the first sentence of its docstring."""

    ops: tuple[str, ...]
    summary: str


def families() -> tuple[Family, ...]:
    """Every op key of the rule table, once, by the file and the rule that knows it."""
    found: dict[str, dict[Any, list[str]]] = {}
    for key, entry in table().items():
        function = entry.function
        found.setdefault(function.__module__, {}).setdefault(function, []).append(key)
    return tuple(
        Family(
            name=module.rpartition(".")[2],
            summary=_sentence(sys.modules[module]),
            rules=tuple(
                RuleEntry(tuple(keys), _sentence(function)) for function, keys in rules.items()
            ),
        )
        for module, rules in sorted(found.items())
    )


def spellings() -> dict[str, list[str]]:
    """Op key -> the names that torch, torch.nn.functional (F) and Tensor have for it."""
    result: dict[str, list[str]] = {key: [] for key in table()}
    for space, members in _SPACES:
        for name in sorted(dir(members)):
            member = getattr(members, name, None)
            if name.startswith("__") or not callable(member) or isinstance(member, type):
                continue
            key, _ = op_key(member)
            if key in result:
                result[key].append(f"{space}.{name}")
    return result


def to_dict() -> dict[str, Any]:
    """The coverage in JSON types."""
    spelled = spellings()
    return {
        "count": len(spelled),
        "families": [
            {
                "name": family.name,
                "summary": family.summary,
                "rules": [
                    {
                        "summary": rule.summary,
                        "ops": [{"op": op, "spellings": spelled[op]} for op in rule.ops],
                    }
                    for rule in family.rules
                ],
            }
            for family in families()
        ],
    }


def show(console: Console) -> None:
    """Print a table per family: op keys with their other names, and what becomes of labels."""
    from rich import box
    from rich.table import Table

    synonyms = {op: _other_names(op, names) for op, names in spellings().items()}
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
            table.add_row(", ".join(op + synonyms[op] for op in rule.ops), rule.summary)
        console.print(table)
        console.print()
    console.print(f"{total} ops have a rule; all else is pinned, and the report names it.")


def _other_names(op: str, names: list[str]) -> str:
    """Spellings that are neither the key itself nor its in-place or private form."""
    others = {name.partition(".")[2] for name in names}
    others = {name for name in others if name.strip("_") != op and not name.startswith("_")}
    others -= {f"{name}_" for name in others}
    return f" ({', '.join(sorted(others))})" if others else ""


def _sentence(documented: Any) -> str:
    """The first sentence of a docstring, without the line breaks."""
    paragraph = (inspect.getdoc(documented) or "").partition("\n\n")[0]
    sentence = re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(paragraph.split()), maxsplit=1)[0]
    return sentence.removesuffix(".")
