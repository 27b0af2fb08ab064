"""Every error that the library raises on purpose derives from EnormError.

A message says what was wrong, where (module path, source line, shapes) and what to do next.
"""

from __future__ import annotations

from pathlib import Path


def cannot_write(path: Path, error: OSError) -> str:
    """The message for a file or folder that the system does not let us write."""
    missing = isinstance(error, FileNotFoundError) and not path.parent.exists()
    hint = f"; make the folder {path.parent} first" if missing else ""
    return f"{path} cannot be written: {error.strerror or error}{hint}"


class EnormError(Exception):
    """Base class: catch this to catch everything that enorm_fx raises on purpose."""


class ArgumentError(EnormError, ValueError):
    """An argument has a value or a type that the function does not accept."""


class TraceError(EnormError):
    """The model could not be traced, with or without the given inputs."""


class DataDependentError(TraceError):
    """The shape of a tensor in the model depends on the values of another."""


class RuleError(EnormError):
    """A rule is missing, registered twice, or does not fit the call it was given."""


class NonFiniteError(EnormError, ArithmeticError):
    """A weight, a buffer or a factor is not finite; nothing was written."""


class PlanError(EnormError):
    """The model is no longer the one that was analyzed; nothing was written."""


class OptimizerStateError(EnormError):
    """An optimizer buffer has no known exponent; nothing was written."""


class CheckpointError(EnormError):
    """A file of weights cannot be read or written, or does not fit the model."""
