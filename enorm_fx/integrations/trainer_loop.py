"""ENorm in a loop that somebody else runs: what the callbacks for trainers have in common."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from enorm_fx.analysis import analyze
from enorm_fx.enorm import ENorm
from enorm_fx.errors import ArgumentError
from enorm_fx.model_plan import Plan

_SETTINGS = sorted(set(inspect.signature(ENorm).parameters) - {"plan_or_model", "optimizer"})


class TrainerLoop:
    """Analyzes a trainer's model, has an ENorm follow its optimizer, and keeps ENorm's state.

    given: a plan of the model or of a part of it; None: `plan_` analyzes the model.
    settings: of `ENorm`.

    Raises ArgumentError for a setting that ENorm does not have.
    """

    def __init__(self, given: Plan | None, settings: Mapping[str, Any]) -> None:
        unknown = sorted(settings.keys() - set(_SETTINGS))
        if unknown:
            raise ArgumentError(f"ENorm has no setting '{unknown[0]}', only {', '.join(_SETTINGS)}")
        if given is not None and not isinstance(given, Plan):
            raise ArgumentError(
                f"plan must be what enorm_fx.analyze gave, not {type(given).__name__}"
            )
        self._given, self._settings = given, dict(settings)
        self._plan = given
        self._analyzed: nn.Module | None = None
        self.enorm: ENorm | None = None
        self.state: dict[str, Any] = {}  # of the ENorm that is to be made, or of the last one

    def plan_(self, model: nn.Module, example_inputs: Any) -> None:
        """Find the plan, before the trainer wraps or shards the model.

        Raises ArgumentError where the plan that was given is of another model, and what `analyze`
        raises.
        """
        if self._given is not None:
            if not any(module is self._given.model for module in model.modules()):
                raise ArgumentError(
                    f"the plan is of a {type(self._given.model).__name__} that the trained "
                    f"{type(model).__name__} does not contain: analyze the model that is trained, "
                    "or a part of it"
                )
        elif self._analyzed is not model:
            self._plan, self._analyzed = analyze(model, example_inputs), model

    def begin_(self, model: nn.Module, optimizer: Optimizer, example_inputs: Any) -> None:
        """Have ENorm run after each step of the optimizer, from the kept state on."""
        self.end_()
        self.plan_(model, example_inputs)
        if self._plan is None:
            raise ArgumentError("there is no plan")
        enorm = ENorm(self._plan, optimizer, **self._settings)
        if self.state:
            enorm.load_state_dict(self.state)
        self.enorm = enorm.attach()

    def now(self) -> dict[str, Any]:
        """The state to be saved: of ENorm, or what was kept while there is none."""
        return self.state if self.enorm is None else self.enorm.state_dict()

    def end_(self) -> None:
        """Leave the optimizer alone; the state is kept. Nothing if nothing has begun."""
        if self.enorm is not None:
            self.state = self.enorm.state_dict()
            self.enorm.detach()
            self.enorm = None
