"""Small models of every kind, each with its inputs, for exact counts."""

from __future__ import annotations

from tests.support import zoo_blocks, zoo_chains, zoo_products, zoo_reach, zoo_writes
from tests.support.zoo_kit import ZOO, Net, Small, parameter

__all__ = [
    "ZOO",
    "Net",
    "Small",
    "parameter",
    "zoo_blocks",
    "zoo_chains",
    "zoo_products",
    "zoo_reach",
    "zoo_writes",
]
