"""Find every rescaling of a PyTorch model's weights that keeps its function, and use it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from enorm_fx._version import __version__
from enorm_fx.errors import EnormError
from enorm_fx.verify import Verification, count_symmetries, verify

if TYPE_CHECKING:
    from enorm_fx.analysis import analyze
    from enorm_fx.enorm import ENorm, Report, balance
    from enorm_fx.plan import Plan

__all__ = [
    "ENorm",
    "EnormError",
    "Plan",
    "Report",
    "Verification",
    "__version__",
    "analyze",
    "balance",
    "count_symmetries",
    "verify",
]

# Loaded when first used: tracing and networkx take longer to import than most scripts wait.
_HOME = {
    "ENorm": "enorm",
    "Plan": "plan",
    "Report": "enorm",
    "analyze": "analysis",
    "balance": "enorm",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"enorm_fx.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
