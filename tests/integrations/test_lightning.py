"""ENormCallback in Lightning's own Trainer: the same bits as by hand, and as without a break."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from enorm_fx import ENorm, analyze
from enorm_fx.errors import ArgumentError
from tests.support.helpers import same_bits, weights
from tests.support.training import BATCH, EPOCHS, data, network, sgd

pytest.importorskip("lightning")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its dependencies say while they are imported
    from lightning.pytorch import LightningModule, Trainer

    from enorm_fx.integrations.lightning import ENormCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Classifier(LightningModule):
    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.network = network()
        self.example_input_array = torch.zeros(2, 6)
        self._optimizers = optimizers

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]).float(), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return [sgd(self) for _ in range(self._optimizers)]


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*data()), batch_size=BATCH)


def trainer(folder: Path, callback: ENormCallback, **settings: Any) -> Trainer:
    return Trainer(
        **{
            "default_root_dir": folder, "max_epochs": EPOCHS, "accelerator": "cpu",
            "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": False, "callbacks": [callback], **settings,
        }
    )  # fmt: skip


def by_hand(accumulate: int = 1) -> dict[str, Tensor]:
    model = network()
    optimizer = sgd(model)
    enorm = ENorm(analyze(model), optimizer, c=1.2)
    for _ in range(EPOCHS):
        for number, (inputs, labels) in enumerate(loader(), start=1):
            (F.cross_entropy(model(inputs), labels) / accumulate).backward()
            if number % accumulate == 0:
                optimizer.step()
                enorm.step()
                optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("given", [True, False])
def test_the_weights_are_those_of_the_loop_by_hand(
    tmp_path: Path, accumulate: int, given: bool
) -> None:
    module = Classifier()
    callback = ENormCallback(analyze(module.network) if given else None, c=1.2)
    trainer(tmp_path, callback, accumulate_grad_batches=accumulate).fit(module, loader())
    assert same_bits(weights(module.network), by_hand(accumulate))
    assert callback.enorm is None
    assert callback.state_dict()["calls"] == EPOCHS * 4 // accumulate


def test_a_step_less_would_be_seen() -> None:
    assert not same_bits(by_hand(2), by_hand(1))


def _amp(folder: Path, epochs: int, resume: Path | None = None) -> tuple[Trainer, Classifier]:
    module = Classifier()
    fitted = trainer(
        folder, ENormCallback(every=3), max_epochs=epochs, precision="bf16-mixed",
        gradient_clip_val=0.5, accumulate_grad_batches=2,
    )  # fmt: skip
    fitted.fit(module, loader(), ckpt_path=resume)
    return fitted, module


def test_resumed_with_amp_clipping_and_accumulation_bit_for_bit(tmp_path: Path) -> None:
    _, whole = _amp(tmp_path, epochs=4)
    first, half = _amp(tmp_path, epochs=2)
    assert not same_bits(weights(half), weights(whole))
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = _amp(tmp_path, epochs=4, resume=tmp_path / "half.ckpt")
    assert same_bits(weights(resumed), weights(whole))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"ENorm has no setting 'lr', only backend, .*start"):
        ENormCallback(lr=0.1)
    with pytest.raises(ArgumentError, match=r"plan must be what .* gave, not Linear"):
        ENormCallback(nn.Linear(2, 2))  # type: ignore[arg-type]
    other = ENormCallback(analyze(network()))
    with pytest.raises(ArgumentError, match="plan is of a Sequential that the trained Classifier"):
        trainer(tmp_path, other).fit(Classifier(), loader())


def test_after_an_error_the_optimizer_is_left_alone(tmp_path: Path) -> None:
    module, callback = Classifier(), ENormCallback()
    fitted = trainer(tmp_path, callback)
    labels = torch.full((32,), 7)  # no such class
    bad = DataLoader(TensorDataset(data()[0], labels), batch_size=BATCH)
    with pytest.raises(IndexError):
        fitted.fit(module, bad)
    assert callback.enorm is None
    [optimizer] = fitted.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
