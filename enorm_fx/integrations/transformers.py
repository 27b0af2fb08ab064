"""ENorm in the Trainer of transformers: `Trainer(..., callbacks=[ENormCallback()])`.

Needs `pip install enorm-fx[hf]`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from enorm_fx.enorm import ENorm
from enorm_fx.errors import ArgumentError
from enorm_fx.integrations.trainer_loop import TrainerLoop
from enorm_fx.model_plan import Plan


class ENormCallback(TrainerCallback, ExportableState):
    """One step of ENorm after each step of the optimizer, its state in trainer_state.json.

    Batches that only accumulate gradients make no step, nor do steps that a gradient scaler skips.

    plan: of the model or of a module in it; None: the model is analyzed when the Trainer is made,
        before anything wraps it.
    example_inputs: for that analysis; None: the model's `dummy_inputs`, if it has any.
    settings: of `ENorm`, such as c=1.2.

    Raises ArgumentError for a setting or a plan that is none; in `train`, for a plan of another
    model, for two ENormCallbacks in one Trainer, and where the Trainer has made this one anew.
    """

    def __init__(
        self, plan: Plan | None = None, *, example_inputs: Any = None, **settings: Any
    ) -> None:
        self._loop = TrainerLoop(plan, settings)
        self._inputs = example_inputs
        self.made_anew = False

    @property
    def enorm(self) -> ENorm | None:
        """What runs while the Trainer trains."""
        return self._loop.enorm

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if isinstance(kwargs.get("model"), nn.Module):
            self._loop.plan_(kwargs["model"], self._inputs_of(kwargs["model"]))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        name = type(self).__name__
        if self.made_anew:
            raise ArgumentError(
                f"restore_callback_states_from_checkpoint=True has made {name} anew from a file, "
                "which holds no plan: leave it out, ENorm's state is restored without it"
            )
        # A checkpoint of a run without this callback has no entry, and the Trainer needs one.
        all_saved: Any = state.stateful_callbacks
        saved = all_saved.setdefault(name, self.state())
        if isinstance(saved, list):
            raise ArgumentError(f"this Trainer has {len(saved)} of {name}: one is enough")
        self._loop.state = dict(saved["attributes"].get("enorm_state", {}))
        model = kwargs["model"]
        self._loop.begin_(model, _unwrapped(kwargs["optimizer"]), self._inputs_of(model))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._loop.end_()

    def state(self) -> dict[str, Any]:
        """What the Trainer saves, in JSON types."""
        return {"args": {}, "attributes": {"made_anew": True, "enorm_state": self._loop.now()}}

    def _inputs_of(self, model: nn.Module) -> Any:
        return getattr(model, "dummy_inputs", None) if self._inputs is None else self._inputs


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """Without the wrapper of accelerate, which may pass over steps."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
