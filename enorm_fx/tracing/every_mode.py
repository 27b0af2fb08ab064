"""Trace a model in every mode that its code asks for, and see that it does the same each time.

A plan must hold in training and in evaluation, with gradients and without: a plan made while
evaluating would otherwise change what is trained (an auxiliary head that only training runs). So
the model runs again, with every answer turned round. Those runs compute nothing: they are compared,
call by call, with what was recorded. Only where they differ is the model traced anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Protocol

from torch import nn

from enorm_fx.errors import TraceError
from enorm_fx.tracing.differences import Difference
from enorm_fx.tracing.joined import joined
from enorm_fx.tracing.modes import Mode, is_users
from enorm_fx.tracing.recorder import AskedOfInputs
from enorm_fx.tracing.trace import Trace
from enorm_fx.tracing.undisturbed import Snapshot


class AnyRecording(Protocol):
    """What a front end gives: one run, which others can be compared with."""

    @property
    def modes(self) -> frozenset[str]:
        """The modes, besides training, whose answers make a difference to the front end."""

    @property
    def asked(self) -> Sequence[AskedOfInputs]:
        """What the model asked about its inputs, and was answered."""

    def again(self, asked: set[str] | None = None) -> Difference | None:
        """Run the model once more: where it does something else. Takes the modes asked for."""

    def trace(self) -> Trace:
        """The trace of the run. Nothing can be compared with it afterwards."""


def trace_in_every_mode(
    model: nn.Module, snapshot: Snapshot, record: Callable[..., AnyRecording]
) -> Trace:
    """The trace of the mode that the model is in, joined by those of others that differ.

    What the model asks about its inputs (is anything masked?) is answered both ways, too.

    snapshot: what the model holds.
    record: runs the model in the mode that it is in when called, its first questions about the
        inputs answered by the `answers`. Raises TraceError.
    """
    recordings: list[AnyRecording] = []
    notes: list[str] = []
    todo: list[tuple[bool, ...]] = [()]
    for answers in todo:  # which grows
        search = _Search(model, snapshot, partial(record, answers=answers))
        try:
            search.trace_as_it_is()
        except TraceError as error:
            if not answers:
                raise
            notes.append(_holds_for(recordings, answers, str(error).partition(". ")[0]))
            continue
        if any(is_users(module) for module in model.modules()):
            search.trace_switched()
        notes += search.notes
        for recording in search.recordings:
            recordings.append(recording)
            given = tuple(asked.answer for asked in recording.asked)
            others = [(*given[:i], not given[i]) for i in range(len(answers), len(given))]
            todo += [other for other in others if other not in todo]
        if len(todo) > _MOST_ANSWERS:
            raise TraceError(
                f"{type(model).__name__} takes more than {_MOST_ANSWERS} ways by what it reads "
                f"from its inputs, as at {recordings[0].asked[-1].source}. Analyze its parts"
            )
    snapshot.restore()
    return joined([recording.trace() for recording in recordings], tuple(notes))


_MOST_ANSWERS = 16


def _holds_for(recordings: list[AnyRecording], answers: tuple[bool, ...], why: str) -> str:
    """A note about inputs for which the model cannot be traced."""
    asked = next(
        recording.asked[len(answers) - 1]
        for recording in recordings
        if [a.answer for a in recording.asked][: len(answers)] == [*answers[:-1], not answers[-1]]
    )
    return (
        f"Holds for inputs of which the answer at {asked.source} is {asked.answer}: for others the "
        f"model cannot be traced, {why}"
    )


class _Search:
    """Recordings of a model that differ, in the order in which they were made."""

    def __init__(
        self, model: nn.Module, snapshot: Snapshot, record: Callable[[], AnyRecording]
    ) -> None:
        self.recordings: list[AnyRecording] = []
        self.notes: list[str] = []
        self._model = model
        self._snapshot = snapshot
        self._record = record

    def trace_as_it_is(self) -> None:
        """Training or evaluation, as the model is. Raises TraceError."""
        mode = Mode()
        with mode.entered(self._model):
            first = self._record()
        self.recordings.append(first)
        asked: set[str] = set()
        other = Mode(grad=True, inference=True, autocast=True)
        if self._differs(first, other, asked):  # from where the first run left the model
            self._settle(first, mode)
            asked = asked or set(first.modes)
        else:
            self._watch_numbers(first, mode)
        self._vary(mode, asked)

    def trace_switched(self) -> None:
        """Training instead of evaluation, or the other way round."""
        asked: set[str] = set()
        mode = Mode(switched=True)
        other = Mode(switched=True, grad=True, inference=True, autocast=True)
        if self._is_known(other, asked) and not asked:
            return  # then the answers do not matter in `mode` either
        if self._visit(mode, asked):
            if not self._is_known(other, asked) and not asked:
                asked.update(self.recordings[-1].modes)
            self._vary(mode, asked)

    def _vary(self, mode: Mode, asked: set[str]) -> None:
        """Every combination of answers to what is asked; more may be asked on the way."""
        done = {mode}
        while True:
            flags = sorted(asked)
            modes = [
                Mode(mode.switched, **dict(zip(flags, answers, strict=True)))
                for answers in product((False, True), repeat=len(flags))
            ]
            todo = [mode for mode in modes if mode not in done]
            if not todo:
                return
            for other in todo:
                done.add(other)
                self._visit(other, asked)

    def _visit(self, mode: Mode, asked: set[str]) -> bool:
        """See that the mode is among the recordings. False where it cannot be traced."""
        if self._is_known(mode, asked):
            return True
        self._snapshot.restore()
        try:
            with mode.entered(self._model):
                recording = self._record()
            self._settle(recording, mode)
        except TraceError as error:
            self._note_failure(mode, str(error).partition(". ")[0])
            return False
        self.recordings.append(recording)
        return True

    def _is_known(self, mode: Mode, asked: set[str]) -> bool:
        for recording in self.recordings:
            self._snapshot.restore()
            if not self._differs(recording, mode, asked):
                return True
        return False

    def _differs(
        self, recording: AnyRecording, mode: Mode, asked: set[str] | None = None
    ) -> Difference | None:
        """Where a run in a mode, from the state that the model is in, is another one."""
        with mode.entered(self._model):
            return recording.again(asked)

    def _settle(self, recording: AnyRecording, mode: Mode) -> None:
        """See that the model does in further calls what it does in the first.

        A model that prepares something in its first call (a table) is traced before and after; one
        that counts its calls is refused.
        """
        self._repeat_first_call(recording, mode)
        difference = self._differs(recording, mode)
        if difference is None:
            self._watch_numbers(recording, mode)
            return
        self._repeat_first_call(recording, mode)
        with mode.entered(self._model):
            second = self._record()
        numbers = self._snapshot.numbers()
        goes_on = self._differs(second, mode)
        if goes_on or numbers != self._snapshot.numbers():
            raise self._refusal(difference)
        self.recordings.append(second)

    def _repeat_first_call(self, recording: AnyRecording, mode: Mode) -> None:
        self._snapshot.restore()
        difference = self._differs(recording, mode)
        if difference is not None:
            raise self._refusal(difference)

    def _watch_numbers(self, recording: AnyRecording, mode: Mode) -> None:
        """Numbers that every call changes may lead it another way some day: a few more calls."""
        numbers = self._snapshot.numbers()
        for _ in range(_MORE_CALLS):
            if not numbers:
                return
            difference = self._differs(recording, mode)
            if difference is not None:
                raise self._refusal(difference)
            before, numbers = numbers, self._snapshot.numbers()
            if numbers == before:
                return
        names = sorted({name for name, _ in numbers if not name.startswith("a ")})
        if names:
            self.notes.append(
                f"Every call changes {', '.join(names)}. {_MORE_CALLS + 2} calls in a row did the "
                "same; the plan holds for as long as they do."
            )

    def _refusal(self, difference: Difference) -> TraceError:
        return TraceError(
            f"{type(self._model).__name__} does not do the same in every call: one makes "
            f"{difference.first}, where another makes {difference.second}. Analyze it with what "
            "decides between them (a counter, a random number) fixed"
        )

    def _note_failure(self, mode: Mode, why: str) -> None:
        if mode == Mode(switched=True):
            here, there = Mode().words(self._model), mode.words(self._model)
            note = f"Holds in {here} only: in {there} the model cannot be traced, {why}"
        else:
            note = f"May not hold in {mode.words(self._model)}: it cannot be traced there, {why}"
        self.notes.append(note)


_MORE_CALLS = 8
