"""From a model and example inputs to a Trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from enorm_fx.errors import ArgumentError, DataDependentError, TraceError
from enorm_fx.tracing.inputs import Call, as_call, guesses, shapes_of
from enorm_fx.tracing.symbolic import trace_symbolic
from enorm_fx.tracing.trace import Node, Spec, Trace

FrontEnd = Callable[[nn.Module, Any, Any], Trace]

__all__ = ["Node", "Spec", "Trace", "trace"]


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    tracer: str = "auto",
    opaque: tuple[type[nn.Module], ...] = (),
) -> Trace:
    """Trace the model in the mode that it is in. Raises TraceError; the model stays as it was.

    tracer: "symbolic", "export", or "auto" for the first of them that succeeds.
    opaque: classes of modules that are one call each (the symbolic front end alone can do that).
    """
    if opaque:
        if tracer == "export":
            raise ArgumentError('rules for modules need tracer="symbolic" or "auto"')
        front_ends: list[FrontEnd] = [partial(trace_symbolic, opaque=opaque)]
    else:
        front_ends = [_FRONT_ENDS[tracer]] if tracer in _FRONT_ENDS else [*_FRONT_ENDS.values()]
    if example_inputs is not None:
        return _first_success(front_ends, model, as_call(example_inputs))
    tried: list[str] = []
    first: TraceError | None = None
    for call in guesses(model):
        try:
            return _first_success(front_ends[:1], model, call)
        except TraceError as error:
            first = first or error
            tried.append(shapes_of(call))
    if first is None:
        raise TraceError(
            f"{type(model).__name__} has no layer that tells the shape of its input: "
            "pass example_inputs"
        )
    raise TraceError(
        f"no input shape could be inferred (tried {'; '.join(tried)}): pass example_inputs. "
        f"The first attempt failed {first}"
    ) from first


def _export(model: nn.Module, args: Any, kwargs: Any) -> Trace:
    from enorm_fx.tracing.exported import trace_export  # torch.export is slow to import

    return trace_export(model, args, kwargs)


_FRONT_ENDS: dict[str, FrontEnd] = {"symbolic": trace_symbolic, "export": _export}


def _first_success(front_ends: list[FrontEnd], model: nn.Module, call: Call) -> Trace:
    """The trace of the first front end that can; else one error with every reason."""
    errors: list[TraceError] = []
    for front_end in front_ends:
        try:
            return front_end(model, *call)
        except TraceError as error:
            errors.append(error)
    if any(isinstance(error, DataDependentError) for error in errors):
        return trace_symbolic(model, *call, cut=True)
    if len(errors) == 1:
        raise errors[0]
    raise TraceError("; ".join(str(error) for error in errors)) from errors[0]
