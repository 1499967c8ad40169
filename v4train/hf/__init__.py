"""To and from transformers: `to_hf(model)` and `from_hf(path_or_model)`."""

from v4train.hf.deepseek_v4 import from_hf, to_hf

__all__ = ["from_hf", "to_hf"]
