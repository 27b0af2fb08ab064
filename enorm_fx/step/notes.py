"""What a user of ENorm should know once: told to the logger "enorm_fx", at the level INFO.

Python prints no such message unless asked to (`logging.basicConfig(level="INFO")`). What a user
must act on is a warning or an error instead.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from enorm_fx.plan.data import PlanData
from enorm_fx.plan.records import Group

LOGGER = logging.getLogger("enorm_fx")


class Notes:
    """What one ENorm has to say, each sentence once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def backend(self, name: str, why: str = "") -> None:
        """By which backend steps run, and why not by another."""
        self._say(f"ENorm's steps run by backend '{name}'" + (f": {why.strip()}" if why else ""))

    def left_out(self, plan: PlanData, moved: Sequence[Group]) -> None:
        """Groups that no step moves, and frozen parameters that keep their values."""
        count = len(plan.groups) - len(moved)
        if count:
            self._say(
                f"ENorm moves {len(moved)} of {len(plan.groups)} groups: {count} would move a last "
                "weight (last_layer=False)"
            )
        frozen = sorted({side.node for side in plan.blocked if "is frozen" in side.reason})
        if frozen:
            more = f" and {len(frozen) - 1} more" if len(frozen) > 1 else ""
            self._say(
                f"ENorm leaves alone what frozen parameters hold fast: '{frozen[0]}'{more} "
                "(analyze with frozen='rescale' moves them too)"
            )

    def started(self, largest: float) -> None:
        """The weights were brought to the optimum. largest: |log factor| of any entry."""
        self._say(
            "ENorm has balanced the weights before the first step (start='balanced'): the largest "
            f"factor, or divisor, was {math.exp(min(largest, 700.0)):.3g}"
        )

    def refused(self, why: object) -> None:
        """A step that changed nothing."""
        self._say(f"ENorm refused a step: {why}")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            LOGGER.info(text)
