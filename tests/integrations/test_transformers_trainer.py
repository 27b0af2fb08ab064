"""ENormCallback in the Trainer of transformers: the same bits as by hand, and as unbroken."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enorm_fx import ENorm, analyze
from enorm_fx.errors import ArgumentError
from tests.support.helpers import same_bits, weights
from tests.support.language_models import build
from tests.support.training import BATCH, EPOCHS, data, network, sgd

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from enorm_fx.integrations.transformers import ENormCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Classifier(nn.Module):
    """The network as the Trainer wants it: with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.dummy_inputs = {"x": torch.zeros(2, 6)}

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.network(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels)}


def rows() -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": y} for x, y in zip(*data(), strict=True)]


def trainer(
    folder: Path, model: nn.Module, callbacks: list[ENormCallback], rows: Any, **settings: Any
) -> Any:
    optimizer = sgd(model)
    args = transformers.TrainingArguments(
        **{
            "output_dir": str(folder), "num_train_epochs": EPOCHS, "use_cpu": True,
            "per_device_train_batch_size": BATCH, "max_grad_norm": 0, "report_to": [],
            "train_sampling_strategy": "sequential", "save_strategy": "no", "disable_tqdm": True,
            "logging_strategy": "no", **settings,
        }
    )  # fmt: skip
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return transformers.Trainer(
        model, args, train_dataset=rows, optimizers=(optimizer, constant), callbacks=callbacks
    )


def by_hand(accumulate: int, attached: bool) -> dict[str, Tensor]:
    model = Classifier()
    optimizer = sgd(model)
    enorm = ENorm(analyze(model.network), optimizer, c=1.2)
    if attached:
        enorm.attach()
    inputs, labels = data()
    for _ in range(EPOCHS):
        for number, (x, y) in enumerate(
            zip(inputs.split(BATCH), labels.split(BATCH), strict=True), start=1
        ):
            (model(x, y)["loss"] / accumulate).backward()
            if number % accumulate == 0:
                optimizer.step()
                if not attached:
                    enorm.step()
                optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize(("accumulate", "given"), [(1, True), (1, False), (2, True)])
def test_the_weights_are_those_of_the_loop_by_hand(
    tmp_path: Path, accumulate: int, given: bool
) -> None:
    model = Classifier()
    callback = ENormCallback(analyze(model.network) if given else None, c=1.2)
    settings = {"gradient_accumulation_steps": accumulate}
    trainer(tmp_path, model, [callback], rows(), **settings).train()
    assert same_bits(weights(model), by_hand(accumulate, attached=False))
    assert same_bits(weights(model), by_hand(accumulate, attached=True))
    assert callback.enorm is None


def test_a_step_less_would_be_seen() -> None:
    assert not same_bits(by_hand(2, attached=True), by_hand(1, attached=True))


def _llama(folder: Path, steps: int, resume: str | None, **settings: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = build("llama").float()
    generator = torch.Generator().manual_seed(2)
    tokens = [
        {"input_ids": ids, "labels": ids}
        for ids in torch.randint(0, model.config.vocab_size, (16, 6), generator=generator)
    ]
    run = trainer(
        folder, model, [ENormCallback(every=3)], tokens, max_steps=steps,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=1.0,
        save_strategy="steps", save_steps=2, lr_scheduler_type="linear", **settings,
    )  # fmt: skip
    run.train(resume_from_checkpoint=resume)
    return weights(model)


def test_a_language_model_resumes_bit_for_bit(tmp_path: Path) -> None:
    """With accumulation and clipping; the checkpoint is the Trainer's own."""
    whole = _llama(tmp_path / "whole", 4, None)
    half = _llama(tmp_path / "half", 2, None)
    assert not same_bits(half, whole)
    checkpoint = str(tmp_path / "half" / "checkpoint-2")
    assert same_bits(_llama(tmp_path / "half", 4, checkpoint), whole)
    with pytest.raises(ArgumentError, match="holds no plan: leave it out"):
        _llama(tmp_path / "half", 4, checkpoint, restore_callback_states_from_checkpoint=True)


def test_a_checkpoint_of_a_run_without_it_is_taken(tmp_path: Path) -> None:
    model = Classifier()
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, model, [], rows(), max_steps=2, **saving).train()
    old = copy.deepcopy(weights(model))
    callback = ENormCallback()
    resumed = trainer(tmp_path, model, [callback], rows(), max_steps=4, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not same_bits(weights(model), old)
    assert callback.state()["attributes"]["enorm_state"]["calls"] == 2
    assert (tmp_path / "checkpoint-4").is_dir()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="ENorm has no setting 'optimizer'"):
        ENormCallback(optimizer=None)
    with pytest.raises(ArgumentError, match="plan is of a Sequential that the trained Classifier"):
        trainer(tmp_path, Classifier(), [ENormCallback(analyze(network()))], rows())
    two = trainer(tmp_path, Classifier(), [ENormCallback()], rows())
    two.callback_handler.callbacks.append(ENormCallback())
    with pytest.raises(ArgumentError, match="has 2 of ENormCallback: one is enough"):
        two.train()
