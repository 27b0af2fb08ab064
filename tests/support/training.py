"""One small network and its data, trained by hand and in other people's loops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPOCHS, BATCH = 2, 8


def network(seed: int = 0) -> nn.Sequential:
    """Badly scaled a little, so that ENorm has something to do."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)
    )
    with torch.no_grad():
        model[0].weight.mul_(4.0)
    return model


def data(samples: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(samples, 6, generator=generator),
        torch.randint(0, 3, (samples,), generator=generator),
    )


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
