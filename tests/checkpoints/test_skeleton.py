"""A model is built without memory for its weights, and gets those of a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from enorm_fx.checkpoints.skeleton import fill_, fitted, parameters_on_meta, slots
from enorm_fx.errors import CheckpointError


class Tied(nn.Module):
    """Ties, buffers that are saved and not, a frozen parameter, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.rnn = nn.GRU(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight
        self.again = self.norm
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("steps", torch.linspace(0, 1, 4), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.table(tokens).flatten(0, 1)) * self.frozen
        y: Tensor = self.head(self.rnn(x)[0] + self.steps)
        return y


def _filled(weights: dict[str, Tensor]) -> nn.Module:
    with parameters_on_meta():
        model = Tied()
    fill_(model, fitted(model, weights, "IN"))
    return model


def test_a_skeleton_has_buffers_and_no_parameters() -> None:
    with parameters_on_meta():
        model = Tied()
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert model.head.weight is model.table.weight
    assert not model.frozen.requires_grad
    assert not any(p.is_meta for p in Tied().parameters())  # only within the block


def test_filled_it_computes_what_the_model_computes() -> None:
    torch.manual_seed(0)
    model, tokens = Tied().eval(), torch.arange(6).view(2, 3)
    state = model.state_dict()
    wanted = model(tokens)
    for left_out in (None, "head.weight", "table.weight", "norm.num_batches_tracked"):
        weights = {k: v for k, v in state.items() if k != left_out}
        filled = _filled(weights).eval()
        assert torch.equal(filled(tokens), wanted)
        assert filled.head.weight is filled.table.weight
        assert filled.again is filled.norm
        assert not filled.frozen.requires_grad
        first = next(p for name, p in filled.named_parameters() if name == "table.weight")
        assert first.data_ptr() == state["table.weight"].data_ptr()  # nothing was copied


def test_names_of_one_tensor_are_one_slot() -> None:
    names = [slot.names for slot in slots(Tied())]
    assert ("table.weight", "head.weight") in names
    assert ("norm.running_mean", "again.running_mean") in names
    assert not any("steps" in found for found in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("rnn.weight_ih_l0"), "^IN lacks 'rnn.weight_ih_l0'$"),
        (lambda s: s.update(more=torch.ones(1)), "^IN has 'more', which the model does not have$"),
        (
            lambda s: s.update(frozen=torch.ones(5)),
            r"^'frozen' has the shape \(5,\) in IN and \(4,\) in the model$",
        ),
        (
            lambda s: s.update({"head.weight": torch.ones(6, 4)}),
            "^the model ties 'table.weight' and 'head.weight', but IN has different values for th",
        ),
        (
            lambda s: [s.update({f"module.{name}": s.pop(name)}) for name in list(s)],
            "lacks .* and 6 more and has .* with 'module.' before them",
        ),
    ],
)
def test_what_does_not_fit_is_one_error(change: object, message: str) -> None:
    state = Tied().state_dict()
    change(state)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        _filled(state)
