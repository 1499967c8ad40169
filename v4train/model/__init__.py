"""Models in pure PyTorch: nothing here knows of Hydra, DeepSpeed or ranks."""

import importlib
from typing import TYPE_CHECKING, Any

from v4train.model.config import ModelConfig, model_config

if TYPE_CHECKING:
    from v4train.model.transformer import ModelOutput, Transformer, build_model

__all__ = ["ModelConfig", "ModelOutput", "Transformer", "build_model", "model_config"]


def __getattr__(name: str) -> Any:
    """What needs PyTorch is imported when asked for: descriptions of models are read without it, in less time."""
    if name in __all__:
        return getattr(importlib.import_module("v4train.model.transformer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
