"""From a model and example inputs to a Trace."""

from __future__ import annotations

from typing import Any

from torch import nn

from enorm_fx.errors import TraceError
from enorm_fx.tracing.inputs import as_call, guesses
from enorm_fx.tracing.symbolic import describe, trace_symbolic
from enorm_fx.tracing.trace import Node, Spec, Trace

__all__ = ["Node", "Spec", "Trace", "trace"]


def trace(model: nn.Module, example_inputs: Any = None) -> Trace:
    """Trace the model in the mode that it is in. Raises TraceError; the model stays as it was."""
    if example_inputs is not None:
        return trace_symbolic(model, *as_call(example_inputs))
    tried = []
    first: TraceError | None = None
    for args, kwargs in guesses(model):
        try:
            return trace_symbolic(model, args, kwargs)
        except TraceError as error:
            first = first or error
            tried.append(describe((args, kwargs)))
    if first is None:
        raise TraceError(
            f"{type(model).__name__} has no layer that tells the shape of its input: "
            "pass example_inputs"
        )
    raise TraceError(
        f"no input shape could be inferred (tried {'; '.join(tried)}): pass example_inputs. "
        f"The first attempt failed {first}"
    ) from first
