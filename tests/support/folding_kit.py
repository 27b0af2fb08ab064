"""Models as they are after training, and what they give: shared by the tests of folding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EXACT = 1e-12  # relative; what folding may change in float64


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


IMAGES = numbers(4, 2, 6, 6)


def trained(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model in evaluation, with parameters and statistics as of a trained one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_var.uniform_(0.3, 3, generator=generator)  # type: ignore[operator, union-attr]
    return model.to(dtype).eval()


def outputs(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        result = model(*(x.clone() for x in inputs))
    return list(result) if isinstance(result, tuple) else [result]
