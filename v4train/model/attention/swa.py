"""`swa`: sliding-window layer of V4, theta 10000 without YaRN (V4 report section 2.3; V4.md 0, trap 5)."""

from v4train.model.attention.shared_kv import SharedKVAttention
from v4train.model.config import LayerAttention, ModelConfig
from v4train.model.losses import Losses


class SlidingWindowAttention(SharedKVAttention):
    """Each token sees the last `window` tokens of its document, itself included."""

    def __init__(self, config: ModelConfig, losses: Losses, layer: LayerAttention) -> None:
        super().__init__(config, layer, layer.options.rope)
