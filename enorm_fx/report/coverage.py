"""Which ops have a rule, read off the rules: `python -m enorm_fx.report.coverage` writes ops.json.

Run it after adding, renaming or describing a rule.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from typing import Any

import torch
import torch.nn.functional as F

from enorm_fx.errors import RuleError
from enorm_fx.report.op_list import FILE
from enorm_fx.rules import table
from enorm_fx.tracing.op_keys import op_key

_SPACES = (("torch", torch), ("F", F), ("Tensor", torch.Tensor))


def listing() -> dict[str, dict[str, Any]]:
    """What ops.json holds, each part sorted by its keys.

    from:     "torch" -> the version whose spellings are listed, such as "2.9".
    families: name of a file of rules -> the first sentence of its docstring.
    rules:    "family.function" -> the first sentence of its docstring.
    ops:      op key -> its rule and its spellings.

    Raises RuleError where two rules that say different things have one name.
    """
    spelled = _spellings()
    families: dict[str, str] = {}
    rules: dict[str, str] = {}
    ops: dict[str, Any] = {}
    for key, entry in table().items():
        module = sys.modules[entry.function.__module__]
        family = module.__name__.rpartition(".")[2]
        name = f"{family}.{entry.function.__name__}"
        summary = _first_sentence(entry.function)
        if rules.setdefault(name, summary) != summary:
            raise RuleError(f"two rules of {module.__name__} have the name {name}: rename one")
        families[family] = _first_sentence(module)
        ops[key] = {"rule": name, "spellings": spelled[key]}
    return {
        "from": {"torch": ".".join(torch.__version__.split(".")[:2])},
        "families": dict(sorted(families.items())),
        "rules": dict(sorted(rules.items())),
        "ops": ops,
    }


def text() -> str:
    """The content of ops.json: one line for each family, rule and op, so that changes are small."""
    parts = []
    for part, entries in listing().items():
        lines = [f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items()]
        parts.append(f"{json.dumps(part)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _spellings() -> dict[str, list[str]]:
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


def _first_sentence(documented: Any) -> str:
    """The first sentence of a docstring, without the line breaks."""
    paragraph = (inspect.getdoc(documented) or "").partition("\n\n")[0]
    sentence = re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(paragraph.split()), maxsplit=1)[0]
    return sentence.removesuffix(".")


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
