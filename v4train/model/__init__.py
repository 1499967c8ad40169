"""Models in pure PyTorch: nothing here knows of Hydra, DeepSpeed or ranks."""

from v4train.model.config import ModelConfig, model_config
from v4train.model.transformer import ModelOutput, Transformer, build_model

__all__ = ["ModelConfig", "ModelOutput", "Transformer", "build_model", "model_config"]
