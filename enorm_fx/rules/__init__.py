"""What each op does to labels. One file per family; importing this package registers all."""

from enorm_fx.rules import (
    attention,
    elementwise,
    join,
    linear,
    normalization,
    pooling,
    product,
    reduction,
    shape,
)
from enorm_fx.rules.propagate import Labels, propagate
from enorm_fx.rules.registry import Origin, find, rule, table

__all__ = [
    "Labels", "Origin", "attention", "elementwise", "find", "join", "linear", "normalization", "pooling", "product", "propagate",
    "reduction", "rule", "shape", "table",
]  # fmt: skip
