"""TARGET `hf:FOLDER`: a model of transformers, as a folder with config.json and weights has it.

Nothing is downloaded, and no code that comes with a folder is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from enorm_fx.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor, nn

_PREFIX = "hf:"
_BATCH, _TOKENS = 2, 16
_IMAGE = 224  # where a configuration has no size


def folder_of(target: str) -> Path | None:
    """The folder that a target names, None for other targets."""
    return Path(target.removeprefix(_PREFIX)) if target.startswith(_PREFIX) else None


def make(folder: Path) -> nn.Module:
    """The model that the folder's configuration describes, without memory for its parameters.

    Raises ArgumentError where there is no configuration, or no transformers.
    """
    from enorm_fx.checkpoints.skeleton import parameters_on_meta

    if not (folder / "config.json").is_file():
        raise ArgumentError(
            f"{_PREFIX}{folder}: there is no {folder / 'config.json'}. Name a folder that "
            "save_pretrained has written"
        )
    try:
        import transformers
    except ImportError as error:
        raise ArgumentError(
            f"{_PREFIX}{folder} needs transformers: pip install 'enorm-fx[hf]'"
        ) from error
    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    config.use_cache = False  # keys and values are inside the model
    names = config.architectures or ()
    kind = next((k for name in names if (k := getattr(transformers, name, None))), None)
    with parameters_on_meta():
        model: nn.Module = kind(config) if kind else transformers.AutoModel.from_config(config)
    return model


def example(model: Any) -> dict[str, Tensor]:
    """What the model reads first: tokens drawn at random, or images.

    Raises ArgumentError for models that read something else.
    """
    import torch

    config, name = model.config, model.main_input_name
    if name == "input_ids":
        size = config.get_text_config().vocab_size
        # Special tokens are at the ends of a vocabulary.
        low, high = size // 4, max(size - size // 4, size // 4 + 1)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(low, high, (_BATCH, _TOKENS), generator=generator)
        found = {name: tokens}
        return {**found, "decoder_input_ids": tokens} if config.is_encoder_decoder else found
    if name == "pixel_values":
        side = getattr(config, "image_size", _IMAGE)
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return {name: torch.zeros(_BATCH, getattr(config, "num_channels", 3), height, width)}
    raise ArgumentError(f"{type(model).__name__} reads {name}: describe it by --input")
