"""ENorm in Lightning: `Trainer(callbacks=[ENormCallback()])`.

Needs `pip install enorm-fx[lightning]`.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from enorm_fx.enorm import ENorm
from enorm_fx.errors import ArgumentError
from enorm_fx.integrations.trainer_loop import TrainerLoop
from enorm_fx.model_plan import Plan


class ENormCallback(Callback):
    """One step of ENorm after each step of the optimizer, its state in the checkpoints.

    Batches that only accumulate gradients make no step, nor do steps that a gradient scaler skips.

    plan: of the LightningModule or of a module in it; None: the LightningModule is analyzed in
        the `setup` hook, before a strategy wraps it.
    example_inputs: for that analysis; None: the module's `example_input_array`.
    settings: of `ENorm`, such as c=1.2.

    Raises ArgumentError for a setting or a plan that is none; in `fit`, for a plan of another model
    and for more than one optimizer.
    """

    def __init__(
        self, plan: Plan | None = None, *, example_inputs: Any = None, **settings: Any
    ) -> None:
        self._loop = TrainerLoop(plan, settings)
        self._inputs = example_inputs

    @property
    def enorm(self) -> ENorm | None:
        """What runs while the trainer fits."""
        return self._loop.enorm

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # The trainer and all that it holds are no part of the model, and would be looked through.
        pl_module.trainer = None
        try:
            self._loop.plan_(pl_module, self._inputs_of(pl_module))
        finally:
            pl_module.trainer = trainer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise ArgumentError(
                f"{type(pl_module).__name__} has {len(trainer.optimizers)} optimizers, and "
                "ENormCallback follows one: make an ENorm in its training_step instead"
            )
        self._loop.begin_(pl_module, trainer.optimizers[0], self._inputs_of(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loop.end_()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._loop.end_()

    def state_dict(self) -> dict[str, Any]:
        return self._loop.now()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loop.state = dict(state_dict)

    def _inputs_of(self, module: LightningModule) -> Any:
        return module.example_input_array if self._inputs is None else self._inputs
