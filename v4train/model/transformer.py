"""The decoder: embedding, blocks of mixed attention kinds, head, and MTP (DESIGN, decision 1).

    tokens -> Embedding -> Block x L -> Head -> lm_loss
                                     \\-> MTP -> mtp_loss        (trains the trunk too; unused at inference)

Each part maps (streams [B, S, C, M], input ids, document ids, targets) to the same tuple, so that a pipeline can cut
the list anywhere. Shapes: B batch, S sequence, C streams, M hidden, V vocabulary.
"""

from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from v4train.errors import ConfigError
from v4train.model.attention import INDEXED, INDEXED_KINDS
from v4train.model.attention.cache import Cache
from v4train.model.block import Block
from v4train.model.config import ModelConfig, model_config
from v4train.model.documents import compression_blocks
from v4train.model.embedding import Embedding
from v4train.model.head import Head
from v4train.model.init import initialise
from v4train.model.losses import Losses
from v4train.model.moe.router import HashRouter, ScoreRouter
from v4train.model.mtp import MTP, next_tokens
from v4train.model.rules import ATTENTION_MODES, RECOMPUTE_LEVELS
from v4train.model.seams import Seams


class ModelOutput(NamedTuple):
    """`logits` [B, S, V] fp32 without targets; `loss` (the whole objective, scalar) and `losses` with them."""

    logits: Tensor | None
    loss: Tensor | None
    losses: dict[str, Tensor]


class Transformer(nn.Module):
    """A DeepSeek-V4-style language model. Build it with `build_model`."""

    seams = Seams()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.losses = Losses(config.mtp.loss_weight, config.moe.balance_loss_weight)
        self.embedding = Embedding(config)
        layers = zip(config.layers, config.ffn_kinds, strict=True)
        self.blocks = nn.ModuleList(
            Block(config, self.losses, attention, ffn, hashed=layer < config.moe.num_hash_layers)
            for layer, (attention, ffn) in enumerate(layers)
        )
        self.head = Head(config, self.losses)
        self.mtp = MTP(config, self.losses, self.embedding, self.head) if config.mtp.num_layers else None
        self.tie()
        self.register_load_state_dict_post_hook(lambda model, _: model.tie())  # `assign=True` makes two of it

    def tie(self) -> None:
        """Make the output matrix the embedding if the configuration says so: to be called where that was replaced."""
        if self.config.tie_embedding:
            self.head.lm_head.weight = self.embedding.lookup.weight

    def parts(self) -> list[nn.Module]:
        """The flat list that training runs through, in order."""
        return [self.embedding, *self.blocks, self.head, *([self.mtp] if self.mtp is not None else [])]

    def forward(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        targets: Tensor | None = None,
        cache: Cache | None = None,
    ) -> ModelOutput:
        """Logits, or the training objective.

        Args:
            input_ids: [B, S] int64.
            document_ids: [B, S] int64, constant within a document, changing at each start, -1 for padding; None is
                one document a row.
            targets: [B, S] int64, already shifted, -100 where ignored, or [B, S + 2] with the target of the token after
                these and that token, for MTP. With targets no [B, S, V] tensor is kept.
            cache: from `new_cache`: the tokens follow those it has seen, one document a row, and join it. Logits only,
                without gradients; nothing is recorded or counted.

        Returns:
            `loss` = lm_loss + weight * mtp_loss; its backward trains everything, the attached balance and indexer
            losses included (in training mode). In `indexer_warmup` it trains the indexers alone: the rest of the model
            runs without gradients. `losses` are unweighted values for the log.

        Raises:
            ConfigError: tokens that don't fit the cache. ValueError: targets and a cache.
        """
        if cache is not None:
            if targets is not None:
                raise ValueError("targets and a cache: a cache is for generation, it gives logits only")
            return self._continue(input_ids, document_ids, cache)
        if document_ids is None:
            document_ids = torch.zeros_like(input_ids)
        state = (None, input_ids, document_ids, targets)
        if targets is None:
            for part in (self.embedding, *self.blocks):
                state = part(*state)
            self.losses.collect()
            return ModelOutput(self.head.lm_head(self.head.output_norm(state[0]), None), None, {})
        if self.training and self.attention_mode == "indexer_warmup":
            with self.losses.indexers_only():
                return self._objective(state)
        return self._objective(state)

    def _objective(self, state: tuple[None, Tensor, Tensor, Tensor]) -> ModelOutput:
        for part in self.parts():
            state = part(*state)
        losses = self.losses.collect()
        loss = losses["lm_loss"]
        if self.mtp is not None:
            loss = loss + self.losses.mtp_weight * losses["mtp_loss"]
        return ModelOutput(None, self.losses.with_direct(loss), losses)

    @torch.no_grad()
    def _continue(self, input_ids: Tensor, document_ids: Tensor | None, cache: Cache) -> ModelOutput:
        cache.check(input_ids, document_ids)
        with self.losses.silent():
            state = self.embedding(None, input_ids, torch.zeros_like(input_ids), None)
            for block, layer in zip(self.blocks, cache.layers, strict=True):
                state = block(*state, cache=layer)
            logits = self.head.lm_head(self.head.output_norm(state[0]), None)
        cache.length += input_ids.shape[1]
        return ModelOutput(logits, None, {})

    def new_cache(self, batch: int, max_length: int, dtype: torch.dtype | None = None) -> Cache:
        """Empty cache for `batch` rows of at most `max_length` tokens, allocated at once on the model's device.

        dtype: of everything stored; None is the parameters'.
        """
        weight = self.embedding.lookup.weight
        with torch.device("meta"):
            layers = [block.attention.new_cache(batch, max_length) for block in self.blocks]
        return Cache(batch, max_length, layers).allocate(weight.device, dtype or weight.dtype)

    def count(self, input_ids: Tensor, document_ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What each loss of this batch is a mean over: int64 scalars by loss name, for `losses.denominators`."""
        counts = {"lm_loss": (targets[:, : input_ids.shape[1]] != -100).sum()}
        # By kind: from different tokens on they see something. Sorted, because all ranks must have the same order
        for kind in sorted({"csa", "dsa"} & set(self.config.layer_kinds)):
            counts[f"indexer_kl_{kind}"] = self._indexed_tokens(kind, document_ids)
        if self.mtp is not None:
            _, documents, after = next_tokens(input_ids, document_ids, targets)
            counts["mtp_loss"] = (after != -100).sum()
            if (kind := self.config.mtp_layer.kind) in INDEXED_KINDS:
                counts["indexer_kl_mtp"] = self._indexed_tokens(kind, documents)
        return counts

    def _indexed_tokens(self, kind: str, document_ids: Tensor) -> Tensor:
        """Tokens for which a layer's indexer has something to score."""
        if kind == "dsa":
            return (document_ids >= 0).sum()
        sequence = self.seams.sequence
        blocks = compression_blocks(sequence.whole(document_ids), self.config.attention.csa_compression)
        sees = blocks.end > blocks.first
        length = document_ids.shape[1]
        return sees.narrow(1, sequence.begin(length), length).sum()

    @property
    def attention_mode(self) -> str:
        """`sparse` (default), `dense` (all visible entries, indexer unused) or `indexer_warmup` (as dense, while the
        indexers learn, and in training nothing but them)."""
        modes = [module.mode for module in self.modules() if isinstance(module, INDEXED)]
        return modes[0] if modes else "sparse"

    @attention_mode.setter
    def attention_mode(self, mode: str) -> None:
        if mode not in ATTENTION_MODES:
            raise ConfigError("attention_mode", mode, "unknown mode", f"use one of {', '.join(ATTENTION_MODES)}")
        for module in self.modules():
            if isinstance(module, INDEXED):
                module.mode = mode

    @property
    def recompute(self) -> str:
        """What backward computes again, a level of recompute.py: `none` (default), `block` or `attention`."""
        return self.blocks[0].recompute

    @recompute.setter
    def recompute(self, level: str) -> None:
        if level not in RECOMPUTE_LEVELS:
            raise ConfigError("recompute", level, "unknown level", f"use one of {', '.join(RECOMPUTE_LEVELS)}")
        for module in self.modules():
            if isinstance(module, Block):  # MTP's too
                module.recompute = level

    def routers(self) -> dict[str, ScoreRouter]:
        """Score-routed routers by name: their loads and selection biases are the trainer's to update."""
        return {name: module for name, module in self.named_modules() if isinstance(module, ScoreRouter)}

    def hash_routers(self) -> dict[str, HashRouter]:
        """Hash-routed routers by name: nothing of theirs moves with their loads."""
        return {name: module for name, module in self.named_modules() if isinstance(module, HashRouter)}


def build_model(config: DictConfig | ModelConfig) -> Transformer:
    """Model from `cfg.model`, on the current default device, initialised unless that is meta.

    Raises:
        ConfigError: the description breaks a rule.
    """
    config = model_config(config)
    model = Transformer(config)
    if next(model.parameters()).device.type != "meta":
        initialise(model, config)
    return model
