"""`enorm-fx ops`: list every op that has a rule."""

from __future__ import annotations

import argparse
import json

from enorm_fx.cli.command import Command
from enorm_fx.cli.output import terminal


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="with all spellings, as JSON")


def _run(arguments: argparse.Namespace) -> int:
    from enorm_fx.report import op_list

    if arguments.json:
        print(json.dumps(op_list.to_dict(), indent=2))
    else:
        op_list.show(terminal())
    return 0


COMMAND = Command(
    "ops",
    "list every op that has a rule, by family",
    _add_arguments,
    _run,
    description="List every op that has a rule, by family. An op that is not listed keeps the "
    "values of all that it touches: `enorm-fx analyze` names it, with its line.",
)
