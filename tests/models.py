"""Tiny models for tests: every mechanism, dimensions of a few, all weights random so that nothing hides at zero."""

from dataclasses import replace

import torch

from v4train.model import ModelConfig, Transformer, build_model
from v4train.model.config import (
    AttentionConfig,
    FFNConfig,
    GQAConfig,
    IndexerConfig,
    InitConfig,
    MLAConfig,
    MoEConfig,
    MTPConfig,
    ResidualConfig,
    RopeConfig,
)

PLAIN_ROPE = RopeConfig(10000.0, 1.0, 65536, 32.0, 1.0, True, 1.0)
YARN_ROPE = RopeConfig(160000.0, 16.0, 65536, 32.0, 1.0, True, 1.0)


def tiny_config(mix="swa csa hca csa", **changes) -> ModelConfig:
    """A model of a few thousand parameters; `changes` replace fields, dots reach into sections (`moe__top_k=1`)."""
    attention = AttentionConfig(
        num_heads=4,
        head_dim=16,
        rope_dim=8,
        q_lora_rank=12,
        o_groups=2,
        o_lora_rank=8,
        window=8,
        csa_compression=4,
        hca_compression=16,
        rope=replace(PLAIN_ROPE),
        compressed_rope=replace(YARN_ROPE),
        indexer=IndexerConfig(num_heads=2, head_dim=8, top_k=3, loss_weight=1.0),
        gqa=GQAConfig(4, 2, 8, 8, False, False, False, None, 1, 0, replace(PLAIN_ROPE)),
        mla=MLAConfig(4, 12, 10, 6, 4, 8, 1.0, False, None, 1, 0, replace(PLAIN_ROPE)),
        dsa=IndexerConfig(num_heads=2, head_dim=8, top_k=5, loss_weight=1.0),
        query_chunk=16,
    )
    config = ModelConfig(
        name="tiny",
        vocab_size=64,
        hidden_size=32,
        num_layers=0,
        attention_mix=mix,
        ffn_mix="moe",
        norm_eps=1e-6,
        attention=attention,
        ffn=FFNConfig(24, None),
        moe=MoEConfig(8, 2, 16, 1, "sqrtsoftplus", 1, 1, 1.5, False, False, "swiglu", 1, 10.0, 1e-2, 1e-3),
        residual=ResidualConfig("mhc", 4, 20, 1e-6, 0.01, 0.0, 0.0, 0.0),
        mtp=MTPConfig(1, 0.3, "swa"),
        init=InitConfig(0, 0.1),
    )
    config.num_layers = len(config.layer_kinds)
    for path, value in changes.items():
        *sections, field = path.split("__")
        target = config
        for section in sections:
            target = getattr(target, section)
        assert hasattr(target, field), path
        setattr(target, field, value)
    return config


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Model whose zeros and ones (biases, sinks, norms, gates) are random too."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("table"):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif name.endswith("gates"):
                tensor.copy_(0.5 + 0.2 * noise)
            elif tensor.dim() == 1 or name.endswith("bias"):
                tensor.copy_(0.5 * noise)
    return model


def random_tokens(batch: int, length: int, vocab_size: int = 64, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length]."""
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
