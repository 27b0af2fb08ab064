"""What a command of `enorm-fx` is: an entry of the table in `enorm_fx.cli.main`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    """One command. Its module imports torch and rich only when `run` is called.

    name, summary:       what `enorm-fx --help` lists.
    description, epilog: above and below the arguments in `enorm-fx NAME --help`.
    add_arguments:       declares its arguments.
    run:                 does what they ask for and returns the exit status; it may raise an
                         EnormError, which becomes one line on stderr and exit status 2.
    """

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    description: str = ""
    epilog: str = ""
