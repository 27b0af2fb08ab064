"""Front end "symbolic": run the model on fake tensors and record every torch call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import UnsupportedOperatorException

from enorm_fx.errors import DataDependentError, EnormError, TraceError
from enorm_fx.nested import replaced, tensors_anywhere
from enorm_fx.tracing.after_cut import UnreadableError, reachable, running
from enorm_fx.tracing.differences import Difference, first_difference, other_outputs
from enorm_fx.tracing.inputs import Call, shapes_of
from enorm_fx.tracing.modes import ALL
from enorm_fx.tracing.normalize import normalize
from enorm_fx.tracing.outputs import CACHE_NOTE, outputs_of, own_caches
from enorm_fx.tracing.recorder import AskedOfInputs, Recorder
from enorm_fx.tracing.replay import DifferentCall, EndOfRecording, Replay
from enorm_fx.tracing.run import READ_INSIDE, Run
from enorm_fx.tracing.trace import Trace
from enorm_fx.tracing.undisturbed import FOREIGN, Snapshot, quiet

_Leaving = list[tuple[Tensor, str]]


class Recording:
    """One run of a model, recorded, which can be compared with further runs.

    model:    the model. It is left in the state in which the run leaves it.
    call:     its inputs, as (args, kwargs).
    snapshot: what the model held before.
    opaque:   modules of these very classes are recorded as one call each.
    cut:      where what the model does begins to depend on data, end the run instead of raising
              DataDependentError: whatever may be used from there on keeps its values.
    answers:  to the first questions that the model asks about its inputs; to others, as the
              example inputs have it.

    Raises TraceError.
    """

    modes = ALL

    def __init__(
        self,
        model: nn.Module,
        call: Call,
        snapshot: Snapshot,
        opaque: tuple[type[nn.Module], ...] = (),
        cut: bool = False,
        answers: tuple[bool, ...] = (),
    ) -> None:
        self._model = model
        self._call = call
        self._snapshot = snapshot
        self._opaque = opaque
        self._recorder = recorder = Recorder(model, opaque, answers)
        self._notes: tuple[str, ...] = ()
        self._end: DataDependentError | None = None
        with _errors_of(recorder, call):
            self._inputs = _fake_inputs(recorder, call)
            try:
                self._leaving = self._run(recorder)
                if recorder.failure is not None:  # which the model has caught
                    raise recorder.failure
            except DataDependentError as error:
                if not cut:
                    raise
                self._end = error
                self._leaving = self._cut(error)
        if not cut and not any(recorder.knows(t) for t, _ in self._leaving):
            raise TraceError("the model returned no tensor that its inputs or parameters reach")

    def _run(self, run: Run) -> _Leaving:
        """The tensors that leave the model, and how."""
        self._snapshot.restore_inputs()
        with quiet(self._model), run.active():
            args, kwargs = replaced(Tensor, self._inputs, lambda t: t)  # containers of its own
            result = self._model(*args, **kwargs)
        given = {id(t) for t in tensors_anywhere(self._inputs)}
        if own_caches(result, (args, kwargs)):
            self._notes = (CACHE_NOTE,)
        left = [(t, "output of the model") for t in outputs_of(result, (args, kwargs))]
        left += [
            (t, "kept in an input of the model")
            for t in tensors_anywhere((args, kwargs))
            if id(t) not in given
        ]
        left += [(t, f"kept by the model as {name}") for t, name in self._snapshot.new_tensors()]
        left += [(t, READ_INSIDE) for t in run.read_inside]
        return [(run.fakes.of(tensor), how) for tensor, how in left]

    @property
    def asked(self) -> Sequence[AskedOfInputs]:
        """What the model asked about its inputs, and was answered."""
        return self._recorder.asked_of_inputs

    def again(self, asked: set[str] | None = None) -> Difference | None:
        """Run the model once more: where it does something else than in the recorded run.

        The model is as the run before left it, and in the mode that it is in now. asked: takes
        the modes that code other than torch's asks for.
        """
        if self._recorder.changes_shapes:
            return self._recorded_again()
        kept = {id(t) for t, how in self._leaving if how.startswith("kept")}
        replay = Replay(self._recorder, kept, self._end is not None, asked)
        try:
            leaving = self._run(replay)
            replay.finish()
        except DifferentCall as error:
            return error.difference
        except EndOfRecording:
            return None
        except (*FOREIGN, EnormError) as error:
            return Difference("no error", f"{type(error).__name__}: {error}")
        known = self._recorder.knows
        before, now = ({id(t) for t, _ in left if known(t)} for left in (self._leaving, leaving))
        return other_outputs(before, now)

    def _recorded_again(self) -> Difference | None:
        """Results that calls change later cannot be given twice: record anew, compare records."""
        cut = self._end is not None
        given = tuple(asked.answer for asked in self.asked)
        other = Recording(self._model, self._call, self._snapshot, self._opaque, cut, given)
        return first_difference(self._without_others(), other._without_others())

    def _without_others(self) -> Trace:
        """What leaves the model by itself; not what something else keeps."""
        known = [(t, how) for t, how in self._leaving if self._recorder.knows(t)]
        return self._normalized([(self._recorder.node_of(t), how) for t, how in known])

    def trace(self) -> Trace:
        """The neutral trace. Ends the recording."""
        recorder = self._recorder
        leaving = [(recorder.node_of(t), how) for t, how in self._leaving if recorder.knows(t)]
        self._leaving, self._inputs = [], ((), {})  # an output that is a view keeps what it shows
        known = {node for node, _ in leaving}
        cut, self._end = self._end, None
        for node in recorder.alive():
            if cut is not None:
                leaving.append((node, _AFTER))
            elif node not in known and node.op == "call_function":
                leaving.append((node, "it is kept outside of the model"))
        return replace(self._normalized(leaving), cut=cut is not None)

    def _normalized(self, leaving: list[tuple[fx.Node, str]]) -> Trace:
        return normalize(
            self._recorder.graph,
            outputs=leaving,
            aliases=self._recorder.fakes.parameters.aliases,
            tied=self._recorder.fakes.parameters.tied,
            front_end="symbolic",
            inputs=self._call,
            notes=self._notes,
        )

    def _cut(self, error: DataDependentError) -> _Leaving:
        """End the trace at an error: all that may be used afterwards leaves the model there.

        The error keeps alive what the running functions hold; `trace` asks for that.
        """
        try:
            later = reachable(running(error.__traceback__))
        except UnreadableError as why:
            raise DataDependentError(f"{error}. What follows cannot be told: {why}") from error
        for name, parameter in self._model.named_parameters():
            if id(parameter) in later:
                self._recorder.fakes.parameters.tied[name] = _AFTER
        where = str(error).partition(". ")[0]
        self._notes = (f"The analysis ends {where}. What may be used later keeps its values.",)
        return [(t, _AFTER) for t, _ in self._snapshot.new_tensors()]


_AFTER = "it may be used after the model's path begins to depend on data"


@contextmanager
def _errors_of(recorder: Recorder, call: Call) -> Iterator[None]:
    """What a model raises, as a TraceError that says where and for which inputs."""
    try:
        yield
    except EnormError:
        raise
    except UnsupportedOperatorException as error:
        raise TraceError(
            f"{recorder.where()}: {error} has no shape rule (register one with "
            "torch.library.register_fake)"
        ) from error
    except FOREIGN as error:
        raise TraceError(
            f"{recorder.where()}: the model raised {type(error).__name__}: {_in_a_line(error)} for "
            f"inputs {shapes_of(call)}. Pass example_inputs that the model accepts"
        ) from error


def _in_a_line(error: Exception) -> str:
    """The first line of a message; of TorchScript's, which begins with a traceback, the last."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return lines[-1 if "TorchScript" in lines[0] else 0].strip()


def _fake_inputs(recorder: Recorder, call: Call) -> Call:
    """Fake tensors for the example inputs, each named by the way to it."""

    def fake(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            return recorder.input(value, name)
        if isinstance(value, (tuple, list)):
            items = [fake(item, name) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {key: fake(item, f"{name}[{key!r}]") for key, item in value.items()}
        return value

    args, kwargs = call
    names = _positional(recorder.model, len(args))
    return (
        tuple(fake(value, f"input '{name}'") for value, name in zip(args, names, strict=True)),
        {key: fake(value, f"input '{key}'") for key, value in kwargs.items()},
    )


def _positional(model: nn.Module, count: int) -> list[str]:
    """Names of the first positional arguments of forward; *args are numbered."""
    found = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return [found[i] if i < len(found) else str(i) for i in range(count)]
