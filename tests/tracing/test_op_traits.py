"""Properties of ops stand in one table, of keys that exist, and mean what they say."""

from __future__ import annotations

import pytest
import torch

from enorm_fx.tracing import op_keys, op_traits
from tests.support.tracing_kit import sound, two_layers

TRAITS = [name for name in vars(op_traits) if name.isupper()]


@pytest.mark.parametrize("trait", [name for name in TRAITS if name != "METADATA"])
def test_every_key_is_that_of_some_op(trait: str) -> None:
    spelled = {key for key, _ in op_keys._table().values()}
    aten = {name.rstrip("_") for name in dir(torch.ops.aten)}
    given_by_us = {"batch_norm_flat", "instance_norm_flat"}
    assert set(getattr(op_traits, trait)) <= spelled | aten | given_by_us


@pytest.mark.parametrize(
    ("key", "repeatable"),
    [
        ("normalize", True), ("normal", False), ("log_normal", False), ("rand_like", False),
        ("randperm", False), ("alpha_dropout", False), ("dropout2d", False), ("empty_like", False),
        ("new_empty", False), ("embedding", True), ("arange", True), ("rrelu", False),
        ("binomial", False), ("emptiness", True), ("some.users.function", True),
    ],
)  # fmt: skip
def test_random_numbers_are_known_by_what_they_are(key: str, repeatable: bool) -> None:
    assert op_traits.gives_the_same_values(key) is repeatable


def test_a_normalized_constant_has_values_and_a_random_one_has_none() -> None:
    constants = {
        4: lambda: torch.nn.functional.normalize(torch.zeros(4), dim=0),
        0: lambda: torch.alpha_dropout(torch.zeros(4), 0.5, True),
    }
    for scales, constant in constants.items():
        model = two_layers(lambda m, x, c=constant: m.b(m.a(x).relu() + c()))
        assert sound(model) == scales
