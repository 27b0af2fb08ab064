"""What is trained, question by question. A choice: what is not `benchmarks.train`'s default.

"way" is the name that a choice has in the tables; all other keys are options of that command. Where
several learning rates are given, the tables take the one that is best on the images held out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

Choice = Mapping[str, Any]


def grid(*axes: Iterable[Choice]) -> list[dict[str, Any]]:
    """Every combination of one choice of each axis; later axes win."""
    return [{k: v for part in parts for k, v in part.items()} for parts in product(*axes)]


def over(name: str, *values: Any) -> list[dict[str, Any]]:
    """An axis: one option with several values."""
    return [{name: value} for value in values]


_FASHION = {"dataset": "fashion-mnist", "images": 4096, "pool": 2, "validation": 1024}
_MLP = {**_FASHION, "n_layers": 3, "width": 128, "norm": "none", "batch_size": 64, "epochs": 4}
_SGD = {"optimizer": "sgd", "momentum": 0.9}
_ADAMW = {"optimizer": "adamw", "weight_decay": 0.01}
_ENORM = {"enorm": 1.0, "start": "balanced"}
_LAST = {**_ENORM, "last_layer": True}
_ALONE = {"way": "alone"}
_ONCE = {"way": "balanced once", "balance_once": True}
_WAYS: list[Choice] = [
    _ALONE, _ONCE, {"way": "ENorm", **_ENORM}, {"way": "ENorm, last_layer", **_LAST},
]  # fmt: skip

# Learning rates reach down where the units stay badly scaled: only small ones survive there.
_scaled_start = [
    *grid(
        [_MLP],
        over("sigma", 0.0, 0.5, 1.0, 2.0),
        [
            *grid([_SGD], [_ALONE, _WAYS[2]], over("lr", 1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1)),
            *grid([_SGD], [_ONCE, _WAYS[3]], over("lr", 1e-2, 3e-2, 1e-1)),
            *grid([_ADAMW], _WAYS, over("lr", 1e-3, 3e-3, 1e-2)),
        ],
    ),
    # Its steps take twenty times as long as training: one rate, and the worst start.
    *grid(
        [{**_MLP, "sigma": 2.0, **_SGD, "lr": 3e-2}],
        [{"way": "ENorm, last_layer, converge", **_LAST, "converge": True}],
    ),
]

# One setting changed at a time, from ENorm's defaults and from last_layer=True.
_CHANGES: list[Choice] = [
    {"way": "no ENorm"},
    {"way": "defaults", **_ENORM},
    {"way": "start as_is", **_ENORM, "start": "as_is"},
    {"way": "c = 1.2", **_ENORM, "enorm": 1.2},
    {"way": "cycles = 5", **_ENORM, "cycles": 5},
    {"way": "every = 10", **_ENORM, "every": 10},
    {"way": "order = colored", **_ENORM, "order": "colored"},
    {"way": "order = simultaneous", **_ENORM, "order": "simultaneous"},
    {"way": "last_layer", **_LAST},
    {"way": "last_layer, start as_is", **_LAST, "start": "as_is"},
    {"way": "last_layer, c = 0.9", **_LAST, "enorm": 0.9},
    {"way": "last_layer, c = 1.2", **_LAST, "enorm": 1.2},
    {"way": "last_layer, cycles = 5", **_LAST, "cycles": 5},
    {"way": "last_layer, every = 10", **_LAST, "every": 10},
]
_MAIN = ("no ENorm", "defaults", "start as_is", "last_layer", "last_layer, start as_is")
_MAIN_CHANGES = [change for change in _CHANGES if change["way"] in _MAIN]
_DIGITS_RESIDUAL = {
    "dataset": "digits", "validation": 287, "model_type": "resnet", "width": 8, "norm": "none",
    "batch_size": 64, "epochs": 8,
}  # fmt: skip
_settings = [
    *grid([_MLP], over("sigma", 0.0, 1.0), _CHANGES, [_SGD], over("lr", 0.03, 0.1)),
    *grid([_DIGITS_RESIDUAL], over("sigma", 1.0), _MAIN_CHANGES, [_SGD], over("lr", 0.03, 0.1)),
]

# The residual network for long enough to learn, from worse starts too.
_residual_start = grid(
    [{**_DIGITS_RESIDUAL, "epochs": 24, **_SGD}],
    over("sigma", 0.0, 1.0, 2.0),
    _WAYS,
    over("lr", 0.03, 0.1),
)

_BATCHES = {
    2: (0.0003, 0.001, 0.003),
    4: (0.001, 0.003, 0.01),
    16: (0.003, 0.01, 0.03),
    64: (0.01, 0.03, 0.1),
}
_small_batches = grid(
    [{**_MLP, "images": 2048, "validation": 512, "epochs": 2, **_SGD}],
    [{"batch_size": size, "lr": rate} for size, rates in _BATCHES.items() for rate in rates],
    [
        {"way": "BatchNorm", "norm": "bn"},
        {"way": "GroupNorm", "norm": "gn"},
        {"way": "none"},
        {"way": "ENorm", **_ENORM},
        {"way": "ENorm, last_layer", **_LAST},
    ],
)

_DEPTH_WAYS: list[Choice] = [
    {"way": f"{name}, {label}", "norm": norm, **enorm}
    for name, norm in (("BatchNorm", "bn"), ("no BatchNorm", "none"))
    for label, enorm in (
        ("no ENorm", {}), ("ENorm c = 1", {"enorm": 1.0}), ("ENorm c = 1.2", {"enorm": 1.2})
    )
]  # fmt: skip
_depth = grid([_MLP], over("n_layers", 3, 8, 15), _DEPTH_WAYS, over("lr", 0.03, 0.1, 0.3))

_residual = grid(
    [{**_FASHION, "images": 2048, "validation": 512, "model_type": "resnet", "width": 8}],
    [{"norm": "none", "batch_size": 64, "epochs": 6, **_ADAMW}],
    [*_WAYS, {"way": "BatchNorm", "norm": "bn"}, {"way": "GroupNorm", "norm": "gn"}],
    over("lr", 3e-3, 1e-2),
)
_transformer = grid(
    [{"dataset": "text", "images": 2048, "validation": 256, "model_type": "transformer"}],
    [{"n_layers": 2, "batch_size": 16, "epochs": 2, **_ADAMW}],
    _WAYS,
    over("lr", 3e-3, 1e-2),
)

# The paper's networks on CIFAR10, at its size: for a GPU. Beside its learning rates, smaller ones,
# as without BatchNorm deep networks diverge at them.
_paper = [
    *grid(
        [{"dataset": "cifar10", "validation": 5000}],
        over("n_layers", 3, 5, 10, 15, 20),
        _DEPTH_WAYS,
        over("lr", 0.1, 0.05, 0.02),
    ),
    *grid(
        [{"dataset": "cifar10", "validation": 5000, "model_type": "conv", "epochs": 128}],
        [{"momentum": 0.9}],
        [
            {"way": "BatchNorm", "norm": "bn"},
            {"way": "BatchNorm, ENorm c = 1.1", "norm": "bn", "enorm": 1.1},
            {"way": "GroupNorm", "norm": "gn"},
            {"way": "no BatchNorm", "norm": "none"},
            {"way": "no BatchNorm, ENorm c = 1.1", "norm": "none", "enorm": 1.1},
        ],
        over("lr", 0.05, 0.02, 0.01),
    ),
]

# Measured along the training by `benchmarks.sweep.along`.
ALONG = grid([_MLP], [{**_SGD, "lr": 0.03}, {**_ADAMW, "lr": 0.003}], [_ALONE, *_WAYS[2:]])

QUESTIONS: dict[str, list[dict[str, Any]]] = {
    "scaled_start": _scaled_start,
    "settings": _settings,
    "residual_start": _residual_start,
    "small_batches": _small_batches,
    "depth": _depth,
    "residual": _residual,
    "transformer": _transformer,
    "paper": _paper,
}
