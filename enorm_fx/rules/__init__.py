"""What each op does to labels. One file per family; importing this package registers all."""

from enorm_fx.rules import (
    elementwise,
    join,
    linear,
    normalization,
    pooling,
    reduction,
    shape,
)
from enorm_fx.rules.propagate import Labels, propagate
from enorm_fx.rules.registry import find, rule, table

__all__ = [
    "Labels", "elementwise", "find", "join", "linear", "normalization", "pooling", "propagate",
    "reduction", "rule", "shape", "table",
]  # fmt: skip
