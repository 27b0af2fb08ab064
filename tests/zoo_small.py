"""Small models of every kind, each with its inputs, for exact counts."""

from __future__ import annotations

import zoo_blocks
import zoo_chains
import zoo_products
from zoo_kit import ZOO, Net, Small, parameter

__all__ = ["ZOO", "Net", "Small", "parameter", "zoo_blocks", "zoo_chains", "zoo_products"]
