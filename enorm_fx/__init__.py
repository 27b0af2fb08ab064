"""Find every rescaling of a PyTorch model's weights that keeps its function, and use it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from enorm_fx._version import __version__
from enorm_fx.errors import EnormError

if TYPE_CHECKING:
    from enorm_fx.analysis import analyze
    from enorm_fx.balancing import Report, balance
    from enorm_fx.canonical import canonicalize_
    from enorm_fx.comparing import Comparison, compare
    from enorm_fx.counting import count_symmetries
    from enorm_fx.enorm import ENorm
    from enorm_fx.fingerprinting import Fingerprint, fingerprint
    from enorm_fx.folding.batchnorm import Folding, fold_batchnorm_
    from enorm_fx.folding.relu6 import replace_relu6_
    from enorm_fx.imbalances import Imbalance, imbalance
    from enorm_fx.model_plan import Plan
    from enorm_fx.optim import register_optimizer_state
    from enorm_fx.smoothing import Smoothing, smooth
    from enorm_fx.verifying import Verification, verify

# Loaded when first used: torch takes longer to import than `enorm-fx --help` may take. No module
# has the name of a function, or the first import of the module would hide the function.
_HOME = {
    "Comparison": "comparing",
    "ENorm": "enorm",
    "Fingerprint": "fingerprinting",
    "Folding": "folding.batchnorm",
    "Imbalance": "imbalances",
    "Plan": "model_plan",
    "Report": "balancing",
    "Smoothing": "smoothing",
    "Verification": "verifying",
    "analyze": "analysis",
    "balance": "balancing",
    "canonicalize_": "canonical",
    "compare": "comparing",
    "count_symmetries": "counting",
    "fingerprint": "fingerprinting",
    "fold_batchnorm_": "folding.batchnorm",
    "imbalance": "imbalances",
    "register_optimizer_state": "optim",
    "replace_relu6_": "folding.relu6",
    "smooth": "smoothing",
    "verify": "verifying",
}

__all__ = [
    "Comparison",
    "ENorm",
    "EnormError",
    "Fingerprint",
    "Folding",
    "Imbalance",
    "Plan",
    "Report",
    "Smoothing",
    "Verification",
    "__version__",
    "analyze",
    "balance",
    "canonicalize_",
    "compare",
    "count_symmetries",
    "fingerprint",
    "fold_batchnorm_",
    "imbalance",
    "register_optimizer_state",
    "replace_relu6_",
    "smooth",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"enorm_fx.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
