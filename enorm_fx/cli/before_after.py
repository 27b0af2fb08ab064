"""Two checkpoints of one function: a model runs on both, and its outputs are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from enorm_fx.errors import EnormError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from enorm_fx.checkpoints.weight_file import Edit

_ROUNDING = 1e-6  # relative change of float64 outputs above which a rescaling did not keep them
_NOISE = 32  # times as far from the float64 outputs as before, above which it did not either


@dataclass(frozen=True, slots=True)
class Kept:
    """How well outputs were kept. All numbers are relative to the largest output.

    double:        change of the outputs in float64, of weights that nothing rounds.
    dtype:         the weights' own type, such as "bfloat16".
    before, after: how far from the float64 outputs of before those in the own type are.
    identical:     the latter two are the same to the last bit.
    skipped:       why the own type was not compared; empty if it was.
    """

    double: float
    dtype: str
    before: float
    after: float
    identical: bool
    skipped: str = ""

    def __str__(self) -> str:
        text = f"the outputs in float64 changed by {self.double:.1e}"
        if self.skipped:
            return f"{text}; not compared in {self.dtype}: {self.skipped}"
        if self.identical:
            return f"{text}, and in {self.dtype} by nothing at all"
        return (
            f"{text}; in {self.dtype} they were within {self.before:.1e} of those, and now are "
            f"within {self.after:.1e}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Before:
    """What a model gave on random inputs, to be compared with.

    own: outputs in the weights' type, None where it does not run in it; skipped says why.
    """

    call: Any
    dtype: Any
    double: list[Tensor]
    changed: float
    own: list[Tensor] | None
    skipped: str


def run_before(
    model: nn.Module, call: Any, edits: Mapping[str, Edit], release: Callable[[], None]
) -> Before:
    """Run a model on random inputs in float64, with its weights as they are and edited, and in
    their own type.

    Raises EnormError where edits in float64 change what the model computes.
    """
    import torch

    from enorm_fx.checkpoints.running import random_call, run_from_files, run_in_double
    from enorm_fx.tracing.undisturbed import FOREIGN
    from enorm_fx.verifying import relative_change

    call = random_call(call, seed=0)
    double = run_in_double(model, call, release)
    if not double or not all(bool(y.isfinite().all()) for y in double):
        raise EnormError(
            "the model's outputs on random inputs are not finite numbers, so that nothing can be "
            "compared: nothing was written. Describe other inputs by --input"
        )
    changed = relative_change(double, run_in_double(model, call, release, edits))
    if not changed <= _ROUNDING:
        raise EnormError(
            f"the outputs changed by {changed:.1e} in float64: nothing was written. Please report "
            "this model"
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    own, skipped = None, ""
    try:
        own = run_from_files(model, call, release)
    except FOREIGN as error:  # not every operation has a form for every type
        skipped = f"the model does not run in it here ({str(error).strip().partition(chr(10))[0]})"
    else:
        if not all(bool(y.isfinite().all()) for y in own):
            own, skipped = None, "outputs of the model as it was are not finite in it"
    return Before(call, dtype, double, changed, own, skipped)


def compare(before: Before, model: nn.Module, release: Callable[[], None]) -> Kept:
    """Run the model with the weights that were written, in their own type.

    Raises EnormError where the outputs are much further from the float64 ones than before.
    """
    import torch

    from enorm_fx.checkpoints.running import run_from_files
    from enorm_fx.verifying import relative_change

    name = str(before.dtype).removeprefix("torch.")
    if before.own is None:
        return Kept(before.changed, name, 0.0, 0.0, False, before.skipped)
    own = run_from_files(model, before.call, release)
    distance = relative_change(before.double, before.own)
    now = relative_change(before.double, own)
    limit = _NOISE * (distance + torch.finfo(before.dtype).eps)
    if not now <= limit:
        raise EnormError(
            f"the outputs in {name} were within {distance:.1e} of the float64 ones and would be "
            f"within {now:.1e}: nothing was written. Its numbers have too little room for such "
            "scales: try --exact, or another type"
        )
    same = all(torch.equal(old, new) for old, new in zip(before.own, own, strict=True))
    return Kept(before.changed, name, distance, now, same)
