"""Three linear layers in float64 and a step of any optimizer on them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

INPUTS = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def three_layers() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(4, 6, False), nn.ReLU(), nn.Linear(6, 5, False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(5, 3, False)).double()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.mse_loss(model(INPUTS), torch.ones(16, 3, dtype=torch.float64)).backward()
    optimizer.step()
