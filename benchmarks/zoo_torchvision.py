"""torchvision's models with random weights and example inputs of the shapes that they take."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torchvision.models import get_model, get_model_builder, list_models


def names() -> list[str]:
    """Classification, quantizable (in float form), segmentation, detection, video, optical flow."""
    return list(list_models())


def build(name: str) -> tuple[nn.Module, Any]:
    """The model and its inputs."""
    builder = get_model_builder(name)
    accepted = inspect.signature(inspect.unwrap(builder)).parameters
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in accepted:
        options["weights_backbone"] = None
    if "init_weights" in inspect.getsource(builder) or "inception" in name or "googlenet" in name:
        options["init_weights"] = False
    family = builder.__module__
    model = get_model(name, **options)
    if "detection" in family:
        _let_detections_through(model)
        return model, ([torch.rand(3, 160, 200)],)
    if "optical_flow" in family:
        return model, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))
    return model, torch.randn(_shape(name, family))


def _shape(name: str, family: str) -> tuple[int, ...]:
    if "video" in family:
        large = "mvit" in name or "swin" in name or name == "s3d"
        return (1, 3, 16, 224, 224) if large else (1, 3, 8, 112, 112)
    if "segmentation" in family:
        return (1, 3, 96, 96)
    return (1, 3, 299, 299) if "inception" in name else (1, 3, 224, 224)


def _let_detections_through(model: nn.Module) -> None:
    """Random weights give low scores; without a threshold there are outputs to compare."""
    for module in model.modules():
        for attribute in ("score_thresh", "box_score_thresh"):
            if hasattr(module, attribute):
                setattr(module, attribute, 0.0)
