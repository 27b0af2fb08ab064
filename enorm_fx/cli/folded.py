"""`enorm-fx balance --fold-batchnorm`: a folded model is balanced, and its own class loads it.

The weights are in memory here, once more than the file's: folding writes them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from enorm_fx.cli.before_after import Before, Kept
from enorm_fx.cli.weights import map_into_
from enorm_fx.errors import EnormError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from enorm_fx.checkpoints.checkpoint import Checkpoint
    from enorm_fx.checkpoints.weight_file import Edit
    from enorm_fx.folding.batchnorm import Folding
    from enorm_fx.model_plan import Plan

_NOISE = 1000  # times the type's epsilon: how far float64 outputs of weights rounded anew may be


def fold_(model: nn.Module, checkpoint: Checkpoint, inputs: Any) -> Folding:
    """Fold a model whose weights lie in a checkpoint's files, in memory of its own."""
    from enorm_fx.checkpoints.skeleton import fill_, fitted
    from enorm_fx.folding.batchnorm import fold_batchnorm_

    slots = fitted(model, checkpoint.tensors, str(checkpoint.path))
    fill_(model, {slot: tensor.clone() for slot, tensor in slots.items()})
    checkpoint.release()
    return fold_batchnorm_(model, inputs)


def finished_(
    folding: Folding, plan: Plan, edits: Mapping[str, Edit], p: float, checkpoint: Checkpoint
) -> tuple[dict[str, Edit], float]:
    """Balance the folded model and put its BatchNorms back: edits of the files, and the norm of the
    folded model (`plan.norm(p)`) then.

    edits: by name of a parameter of the folded model. The model has the checkpoint's weights again
    afterwards.
    """
    import torch

    with torch.no_grad():
        for name, edit in edits.items():
            edit(folding.model.get_parameter(name))
    norm = plan.norm(p)
    folding.put_back_()
    made = folding.model.state_dict()
    changed: dict[str, Edit] = {
        name: partial(_replace_, made[name].detach().clone())
        for name, tensor in checkpoint.tensors.items()
        if name in made and not torch.equal(made[name], tensor)
    }
    map_into_(folding.model, checkpoint)
    return changed, norm


def checked(kept: Kept, before: Before, model: nn.Module, checkpoint: Checkpoint) -> Kept:
    """With the change of the outputs in float64: of other weights, each rounded once.

    Raises EnormError where it is more than that can be.
    """
    import torch

    from enorm_fx.checkpoints.running import run_in_double
    from enorm_fx.verifying import relative_change

    double = run_in_double(model, before.call, checkpoint.release)
    change = relative_change(before.double, double)
    if not change <= _NOISE * torch.finfo(before.dtype).eps:
        raise EnormError(
            f"folding BatchNorm changed the outputs by {change:.1e} in float64: nothing was "
            "written. Please report this model"
        )
    return replace(kept, double=change)


def _replace_(values: Tensor, tensor: Tensor) -> None:
    tensor.copy_(values)
