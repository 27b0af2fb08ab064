"""From a model and example inputs to a Trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from enorm_fx.errors import ArgumentError, DataDependentError, TraceError
from enorm_fx.tracing.every_mode import AnyRecording, trace_in_every_mode
from enorm_fx.tracing.inputs import Call, as_call, guesses, shapes_of
from enorm_fx.tracing.plain_types import plain_types
from enorm_fx.tracing.symbolic import Recording
from enorm_fx.tracing.trace import Node, Spec, Trace
from enorm_fx.tracing.undisturbed import Snapshot, undisturbed

FrontEnd = Callable[[nn.Module, Call], AnyRecording]

__all__ = ["Node", "Spec", "Trace", "trace"]


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    tracer: str = "auto",
    opaque: tuple[type[nn.Module], ...] = (),
) -> Trace:
    """Trace the model in the mode that it is in, and in others where its code asks for them.

    tracer: "symbolic", "export", or "auto" for the first of them that succeeds.
    opaque: classes of modules that are one call each (the symbolic front end alone can do that).

    Raises TraceError; the model stays as it was.
    """
    if opaque and tracer == "export":
        raise ArgumentError('rules for modules need tracer="symbolic" or "auto"')
    with undisturbed(model, example_inputs) as snapshot, plain_types(model):
        symbolic = partial(Recording, snapshot=snapshot, opaque=opaque)
        front_ends: dict[str, FrontEnd] = {"symbolic": symbolic, "export": _export}
        if opaque or tracer != "auto":
            front_ends = {tracer: front_ends[tracer]} if not opaque else {"symbolic": symbolic}
        record = _Chosen(model, snapshot, [*front_ends.values()], symbolic)
        if example_inputs is not None:
            record.call = as_call(example_inputs)
        return trace_in_every_mode(model, snapshot, record)


def _export(model: nn.Module, call: Call) -> AnyRecording:
    from enorm_fx.tracing.exported import ExportRecording  # torch.export is slow to import

    return ExportRecording(model, call)


class _Chosen:
    """Records runs by the first front end that can, on inputs that are given or found.

    call: the inputs; None as long as none have been found.
    """

    def __init__(
        self,
        model: nn.Module,
        snapshot: Snapshot,
        front_ends: list[FrontEnd],
        symbolic: Callable[..., AnyRecording],
    ) -> None:
        self.call: Call | None = None
        self._model = model
        self._snapshot = snapshot
        self._front_ends = front_ends
        self._symbolic = symbolic

    def __call__(self, answers: tuple[bool, ...] = ()) -> AnyRecording:
        """Raises TraceError with every reason.

        answers: to what the model asks about its inputs; only one front end can give them.
        """
        if self.call is not None and answers:
            return self._symbolic(self._model, self.call, answers=answers)
        if self.call is not None:
            return self._first_success(self._front_ends, self.call)
        tried: list[str] = []
        first: TraceError | None = None
        for call in guesses(self._model):
            try:
                recording = self._first_success(self._front_ends[:1], call)
                self.call = call
                return recording
            except TraceError as error:
                first = first or error
                tried.append(shapes_of(call))
        if first is None:
            raise TraceError(
                f"{type(self._model).__name__} has no layer that tells the shape of its input: "
                "pass example_inputs"
            )
        raise TraceError(
            f"no input shape could be inferred (tried {'; '.join(tried)}): pass example_inputs. "
            f"The first attempt failed {first}"
        ) from first

    def _first_success(self, front_ends: list[FrontEnd], call: Call) -> AnyRecording:
        errors: list[TraceError] = []
        modes = [(module, module.training) for module in self._model.modules()]
        for front_end in front_ends:
            try:
                return front_end(self._model, call)
            except TraceError as error:
                errors.append(error)
                self._snapshot.restore()
                for module, training in modes:  # which may be switched just now
                    module.training = training
        if any(isinstance(error, DataDependentError) for error in errors):
            return self._symbolic(self._model, call, cut=True)
        if len(errors) == 1:
            raise errors[0]
        raise TraceError("; ".join(str(error) for error in errors)) from errors[0]
